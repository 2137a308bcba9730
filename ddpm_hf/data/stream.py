"""Images from a stream, in an order that can be resumed."""

import hashlib
import itertools

import torch
from torch.utils.data import Dataset

from ..randomness import keyed_generator
from .decode import draw_augmentations, read_batch


SHUFFLE_BUFFER = 1000  # consecutive rows of a stream that are shuffled together


class StreamedSet(Dataset):
    """Images from a stream by ordinal. Each block of `SHUFFLE_BUFFER` rows is shuffled.

    `IterableDataset.shuffle` does not serve, because it loses the content of its buffer when a stream is resumed.
    """

    labels = None  # they come with the batches

    def __init__(self, rows, *, classes, read, config, sample):
        self.rows = rows
        self.read = read
        self.config = config
        self.sample = sample
        self.label_of = {value: label for label, value in enumerate(classes)}
        self.class_names = list(classes.values()) or None
        self.channels = read.keywords["channels"]
        self.resolution = config.resolution
        split = (rows.info.splits or {}).get(str(rows.split))
        self.num_images = split.num_examples if split and not config.class_names else None
        identity = (config.dataset_name, config.train_data_dir, config.dataset_config_name, classes, read.keywords)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.load_state_dict(None)

    def __len__(self):
        if self.num_images is None:
            raise TypeError("it is unknown how many images this stream has")
        return self.num_images

    def get(self, indices):
        """Return images `indices` of the stream's first 64, (B,C,H,W) float32 in [-1, 1]; larger ones are left out."""
        return read_batch([self.sample[k] for k in indices if k < len(self.sample)], self.read)

    def state_dict(self):
        """Return the position after the last batch as a dict of JSON values. Process 0's serves all processes."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Go to the position `state`, reading up to `SHUFFLE_BUFFER` rows again; None is the beginning."""
        # "block" is the first ordinal of the current block, "taken" how many of the block's rows were used, "source"
        # the stream's own position before the block.
        self.state = dict(state or {"epoch": 0, "block": 0, "taken": 0, "source": None})
        self.shuffled = self._shuffle()

    def _shuffle(self):
        state, seed = self.state, self.config.seed
        while True:
            files = keyed_generator(seed, "files", state["epoch"])
            self.rows.set_epoch(int(torch.randint(1, 2**31, (), generator=files)))  # seeds the order of the files
            self.rows.load_state_dict(state["source"])
            rows = iter(self.rows)
            while block := list(itertools.islice(rows, SHUFFLE_BUFFER)):
                order = torch.randperm(len(block), generator=keyed_generator(seed, "block", state["block"]))
                for row in order[state["taken"] :].tolist():
                    state["taken"] += 1
                    yield block[row]
                state.update(block=state["block"] + len(block), taken=0, source=self.rows.state_dict())
            state.update(epoch=state["epoch"] + 1, source=None)

    def __getitems__(self, ordinals):
        """Return the batch of a range of ordinals, as `training_batches` describes it."""
        if ordinals.start < self.state["block"] + self.state["taken"]:  # slow: read the stream again
            self.load_state_dict(None)
        skipped = ordinals.start - self.state["block"] - self.state["taken"]
        rows = list(itertools.islice(self.shuffled, skipped, skipped + len(ordinals)))
        items = zip(ordinals, [row["image"] for row in rows])
        augmentations = draw_augmentations(ordinals, self.config, random_crop=not self.config.center_crop)
        batch = {"ordinals": torch.tensor(ordinals), "images": read_batch(items, self.read, **augmentations)}
        labels = [self.label_of.get(row.get("label"), -1) for row in rows]
        return batch | {"labels": torch.tensor(labels)} if self.label_of else batch
