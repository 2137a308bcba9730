"""Training batches by ordinal."""

import itertools

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..randomness import FLIP_BLOCK, draws_for, epoch_order, flips
from .stream import StreamedSet, _generators


def training_batches(train_set, config, first_ordinal, process_index, num_processes):
    """Yield without end what one process sees: `{"ordinals": (B,) int64, "images": (B,C,H,W), "labels": (B,) int64}`.

    Images are float32 in [-1, 1]; without classes there are no labels. Micro-batch k of process r of P covers the
    ordinals `first_ordinal + (k * P + r) * B + [0, B)`, B = `config.train_batch_size`: an optimizer step of A
    accumulated micro-batches takes the next A * P * B images.

    Raises:
        UserError: for an image that cannot be read.
    """
    size = config.train_batch_size
    starts = itertools.count(first_ordinal + process_index * size, num_processes * size)
    streamed = isinstance(train_set, StreamedSet)
    loader = DataLoader(
        train_set if streamed else TrainingStream(train_set, config.seed, config.random_flip),
        batch_sampler=(range(start, start + size) for start in starts),
        num_workers=0 if streamed or train_set.pixels is not None else config.dataloader_num_workers,
        collate_fn=dict,  # the batches are ready
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except UserError as error:
            # Torch wraps a worker's in its traceback, and in a cycle of references that keeps the workers for seconds.
            raise UserError(str(error.with_traceback(None)).rsplit("UserError: ", 1)[-1].strip()) from None
        yield batch


class TrainingStream(Dataset):
    """The images of a run by ordinal: ordinal n is image `n % N` of the shuffled epoch `n // N`."""

    def __init__(self, images, seed, random_flip):
        self.images, self.seed, self.random_flip = images, seed, random_flip

    def __getitems__(self, ordinals):
        """Return a batch, as `training_batches` describes it, for a range of ordinals."""
        rows = draws_for(ordinals, epoch_order, self.seed, self.images.num_images)
        generators = _generators(self.seed, ordinals) if self.images.random_crop else None
        mirrored = draws_for(ordinals, flips, self.seed, FLIP_BLOCK) if self.random_flip else None
        batch = {
            "ordinals": torch.arange(ordinals[0], ordinals[-1] + 1),
            "images": self.images.get(rows, generators, mirrored),
        }
        return batch if self.images.labels is None else batch | {"labels": self.images.labels[rows]}
