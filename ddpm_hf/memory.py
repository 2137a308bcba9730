"""Process batches, and halve them if memory runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size

from .errors import UserError


def ranges(count: int, size: int) -> list[range]:
    """Return the numbers 0 to count - 1 as ranges of `size` numbers. The last range may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def in_batches(
    work: Callable, batches: Iterable[Sequence], most: int | None = None
) -> Iterator[tuple[Sequence, object]]:
    """Yield (batch, work(batch)) for each batch. If memory runs out, halve this batch until it fits.

    Later batches keep the smaller size. The main process prints this size.

    Args:
        work: a function of a batch. If memory runs out, it is called again with the first half of the batch. It must
            therefore create its random generators in each call.
        batches: sequences that can be sliced, e.g. ranges.
        most: split batches that are longer than this.

    Raises:
        UserError: if memory runs out for a batch of one.
    """
    for batch in batches:
        start = 0
        while start < len(batch):
            wanted = part = batch[start : start + (most or len(batch))]
            while (done := _attempt(work, part)) is None:
                part = part[: len(part) // 2]
            if len(part) < len(wanted):
                most = len(part)
                PartialState().print(
                    f"{len(wanted)} images together did not fit into memory, so batches now have at most {most}.",
                    flush=True,
                )
            yield part, done[0]
            start += len(part)


def _attempt(work: Callable, batch: Sequence) -> tuple | None:
    """Return (work(batch),), or None if memory ran out."""
    try:
        return (work(batch),)
    except RuntimeError as error:
        # Some devices raise only a RuntimeError. accelerate's function recognizes their messages.
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        if len(batch) == 1:
            refusal = UserError(
                "memory ran out in a batch of one image: end other programs that use this memory, or use a device "
                "that has more."
            )
            refusal.on_one_process = True
            raise refusal from error
    release_memory()  # after the `except` block, because the error keeps the tensors of the failed batch until then
    return None
