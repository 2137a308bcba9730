"""Build the training batches. An image has an ordinal, its number in the order of training (see dataset.py)."""

import functools
import itertools

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..randomness import draws_for, keyed_generator
from .augment import augment
from .decode import draw_augmentations
from .stream import StreamedSet


def training_batches(
    train_set, config, first_ordinal, process_index, num_processes, *, complete=dict, pin_memory=False
):
    """Return an endless iterator over the batches of one process.

    A batch is `{"ordinals": (B,) int64, "images": (B,C,H,W), "labels": (B,) int64}`. Images are float32 in [-1, 1].
    Data without classes has no "labels". With `config.augment_probability`, "augmented" (B,) bool says which images
    were changed. Streamed data adds "position", see `StreamedSet.state_dict`.

    Let B be `config.train_batch_size`, and P the number of processes. Batch k of process r has the ordinals
    `first_ordinal + (k * P + r) * B + [0, B)`. An optimizer step that accumulates A batches per process therefore
    takes the next A * P * B images.

    Args:
        complete: a function that gets each batch and returns what to yield instead. It may run in a worker process.
        pin_memory: put the tensors into pinned memory, from which they can be copied to a GPU in the background.

    Raises:
        UserError: for an image that cannot be read. `next` of the iterator raises it.
    """
    size = config.train_batch_size
    starts = itertools.count(first_ordinal + process_index * size, num_processes * size)
    streamed = isinstance(train_set, StreamedSet)
    loader = DataLoader(
        train_set if streamed else ShuffledSet(train_set, config),
        batch_sampler=(range(start, start + size) for start in starts),
        num_workers=0 if streamed or train_set.pixels is not None else config.dataloader_num_workers,
        collate_fn=functools.partial(_collate, config=config, complete=complete),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # keeps the loader from drawing its seed from torch's global generator
    )
    return _with_plain_errors(iter(loader))


def _collate(batch, config, complete):
    if config.augment_probability:
        batch = augment(batch, config.augment_probability, config.seed)
    return complete(batch)


def _with_plain_errors(batches):
    """Yield the batches of a DataLoader. If a worker process raises a UserError, raise it with only its sentence."""
    while True:
        try:
            batch = next(batches)
        except UserError as error:
            # Keep only the sentence, because torch puts a worker's traceback into the message. Drop the error's own
            # traceback too: it is part of a cycle of references, which keeps the workers alive for seconds.
            raise UserError(str(error.with_traceback(None)).rsplit("UserError: ", 1)[-1].strip()) from None
        yield batch


class ShuffledSet(Dataset):
    """N images in the order of training: the image with ordinal n is image `n % N` of the shuffled epoch `n // N`."""

    def __init__(self, images, config):
        self.images = images
        self.config = config
        self.order = epoch_order
        if config.balance_classes:
            self.order = functools.partial(balanced_order, labels=images.labels)

    def __getitems__(self, ordinals):
        """Return the batch for a range of ordinals, in the form that `training_batches` describes."""
        rows = draws_for(ordinals, self.order, self.config.seed, self.images.num_images)
        augmentations = draw_augmentations(ordinals, self.config, self.images.random_crop)
        batch = {
            "ordinals": torch.arange(ordinals[0], ordinals[-1] + 1),
            "images": self.images.get(rows, **augmentations),
        }
        return batch if self.images.labels is None else batch | {"labels": self.images.labels[rows]}


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_order(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    """Return the row numbers (num_images,) of the images, in the order in which an epoch uses them."""
    return torch.randperm(num_images, generator=keyed_generator(seed, "order", epoch))


@functools.lru_cache(maxsize=2)
def balanced_order(seed: int, epoch: int, num_images: int, labels: torch.Tensor) -> torch.Tensor:
    """Return the order of an epoch of `num_images` images in which all classes are equally frequent.

    The number of images without a class stays the same. The other places are divided equally among the classes, and
    within a class equally among its images. The remainders go to random classes, and to random images of a class.

    Args:
        labels: (num_images,) int64, -1 for images without a class.
    """
    generator = keyed_generator(seed, "balance", epoch)
    classes = labels[labels >= 0].unique()
    places = int((labels >= 0).sum())
    one_more = torch.randperm(len(classes), generator=generator) < places % max(1, len(classes))
    chosen = [(labels < 0).nonzero()[:, 0]]
    for label, more in zip(classes.tolist(), one_more.tolist()):
        rows = (labels == label).nonzero()[:, 0]
        whole, rest = divmod(places // len(classes) + more, len(rows))
        drawn = rows[torch.randperm(len(rows), generator=generator)[:rest]]
        chosen += [rows.repeat(whole), drawn]
    rows = torch.cat(chosen)
    return rows[torch.randperm(len(rows), generator=generator)]
