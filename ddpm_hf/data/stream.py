"""Read images from a stream, in an order that a resumed run continues."""

import hashlib
import itertools

import torch
from torch.utils.data import Dataset

from ..randomness import keyed_generator
from ..sizes import read_size
from .decode import draw_augmentations, read_batch
from .sources import loading


SHUFFLE_BUFFER = 1000  # number of consecutive rows that are shuffled together


class StreamedSet(Dataset):
    """Images of a stream, by their ordinal in the training. Each block of `SHUFFLE_BUFFER` rows is shuffled.

    We do not use `IterableDataset.shuffle`, because it loses the content of its buffer when a stream is resumed.
    """

    labels = None  # each batch brings its own labels

    def __init__(self, rows, *, classes, read, config, sample, check):
        self.rows = rows
        self.read = read
        self.config = config
        self.sample = sample
        self.check = check
        self.label_of = {value: label for label, value in enumerate(classes)}
        self.class_names = list(classes.values()) or None
        self.channels = read.keywords["channels"]
        self.size = read_size(config.resolution)
        split = (rows.info.splits or {}).get(str(rows.split))
        self.num_images = split.num_examples if split and not config.class_names else None
        identity = (config.dataset_name, config.train_data_dir, config.dataset_config_name, classes, read.keywords)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.load_state_dict(None)

    def __len__(self):
        if self.num_images is None:
            raise TypeError("the number of images in this stream is unknown")
        return self.num_images

    def get(self, indices):
        """Return the images at `indices`, (B,C,H,W) float32 in [-1, 1].

        Only the first 64 images of the stream are kept for this, and larger indices are left out.
        """
        return read_batch([self.sample[k] for k in indices if k < len(self.sample)], self.read, self.size)

    def state_dict(self):
        """Return the position after the last batch, a dict of JSON values. It is valid for all processes."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Go to the position `state`; None is the beginning. Up to `SHUFFLE_BUFFER` rows are read again."""
        # "block" is the first ordinal of the current block. "taken" is how many rows of the block were used. "source"
        # is the stream's own position before the block.
        self.state = dict(state or {"epoch": 0, "block": 0, "taken": 0, "source": None})
        self.shuffled = self._shuffle()

    def _shuffle(self):
        state, seed = self.state, self.config.seed
        while True:
            files = keyed_generator(seed, "files", state["epoch"])
            self.rows.set_epoch(int(torch.randint(1, 2**31, (), generator=files)))  # this seeds the order of the files
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
        """Return the batch for a range of ordinals, in the form that `training_batches` describes."""
        if ordinals.start < self.state["block"] + self.state["taken"]:  # go back to the beginning, which is slow
            self.load_state_dict(None)
        skipped = ordinals.start - self.state["block"] - self.state["taken"]
        with loading("the stream"):
            rows = list(itertools.islice(self.shuffled, skipped, skipped + len(ordinals)))
        for ordinal, row in zip(ordinals, rows):
            self.check(ordinal, row["image"])
        items = zip(ordinals, [row["image"] for row in rows])
        augmentations = draw_augmentations(ordinals, self.config, random_crop=not self.config.center_crop)
        batch = {
            "ordinals": torch.tensor(ordinals),
            "images": read_batch(items, self.read, self.size, **augmentations),
            "position": self.state_dict(),  # a checkpoint stores the position after the last used batch
        }
        labels = [self.label_of.get(row.get("label"), -1) for row in rows]
        return batch | {"labels": torch.tensor(labels)} if self.label_of else batch
