"""Images from a stream, in an order that can be resumed."""

import hashlib
import itertools

import torch
from torch.utils.data import Dataset

from ..randomness import FLIP_BLOCK, draws_for, flips, keyed_generator
from .decode import read_batch


SHUFFLE_BUFFER = 1000  # successive rows of a stream that are shuffled among themselves


def _generators(seed, ordinals):
    return [keyed_generator(seed, "augment", n) for n in ordinals]


class StreamedSet(Dataset):
    """Images by ordinal from a stream, of which each `SHUFFLE_BUFFER` rows are shuffled; labels come with the images.

    (Not by `IterableDataset.shuffle`: what is in its buffer is lost when the stream is resumed.)
    """

    labels = None

    def __init__(self, rows, classes, read, config, sample):
        self.rows, self.read, self.config, self.sample = rows, read, config, sample
        self.label_of, self.class_names = {value: k for k, value in enumerate(classes)}, list(classes.values()) or None
        self.channels, self.resolution = read.keywords["channels"], config.resolution
        split = (rows.info.splits or {}).get(str(rows.split))
        self.num_images = split.num_examples if split and not config.class_names else None
        identity = (config.dataset_name, config.train_data_dir, config.dataset_config_name, classes, read.keywords)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.load_state_dict(None)

    def __len__(self):
        if self.num_images is None:
            raise TypeError("nobody knows how many images this stream has")
        return self.num_images

    def get(self, indices):
        """Return some of its first 64 images, (B,C,H,W) float32 in [-1, 1]."""
        return read_batch([self.sample[k] for k in indices if k < len(self.sample)], self.read)

    def state_dict(self):
        """Return the position after the last batch in dicts, lists, strings and numbers; process 0 has one for all."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Go to the position of a `state_dict`, reading up to `SHUFFLE_BUFFER` rows again; None is the beginning."""
        # `block` is the ordinal that the current block starts with, `source` where the stream was before it.
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
        """Return a batch, as `training_batches` describes it, for a range of ordinals (behind: slow)."""
        if ordinals.start < self.state["block"] + self.state["taken"]:
            self.load_state_dict(None)
        skipped = ordinals.start - self.state["block"] - self.state["taken"]
        rows = list(itertools.islice(self.shuffled, skipped, skipped + len(ordinals)))
        generators = None if self.config.center_crop else _generators(self.config.seed, ordinals)
        mirrored = draws_for(ordinals, flips, self.config.seed, FLIP_BLOCK) if self.config.random_flip else None
        images = read_batch(zip(ordinals, [row["image"] for row in rows]), self.read, generators, mirrored)
        batch = {"ordinals": torch.tensor(ordinals), "images": images}
        labels = [self.label_of.get(row.get("label"), -1) for row in rows]
        return batch | {"labels": torch.tensor(labels)} if self.label_of else batch
