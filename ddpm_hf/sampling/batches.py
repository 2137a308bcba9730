"""Draw images in batches that fit into memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..errors import UserError
from ..memory import in_batches
from ..models.pretrained import Pretrained
from .settings import Sampler


AUTO = 64  # images per batch with --batch_size auto, except on a GPU
# At most this many on a GPU. A small UNet needs many, because launching its kernels takes most of the time. For a
# large UNet, `in_batches` halves the batches.
AUTO_ON_GPU = 512


def batch_size_of(batch_size: int | str, num_images: int) -> int:
    """Return a batch size as a number.

    Without a CUDA device, "auto" is AUTO. On a CUDA device, it is the number of images that each process draws, but at
    least AUTO and at most AUTO_ON_GPU.

    Args:
        num_images: how many images all processes draw together.

    Raises:
        UserError: for a number below 1, or for a text other than auto.
    """
    if batch_size == "auto":
        state = PartialState()
        share = math.ceil(num_images / state.num_processes)
        return min(max(AUTO, share), AUTO_ON_GPU) if state.device.type == "cuda" else AUTO
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"--batch_size is {batch_size!r}; it must be a whole number of at least 1, or auto.")
    return int(batch_size)


def draw_in_batches(
    model: Pretrained,
    sampler: Sampler,
    batches: list[Sequence[int]],
    convert: Callable,
    *,
    most: int | None = None,
    on_step: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None,
    progress: bool = True,
) -> Iterator[tuple[Sequence[int], object]]:
    """Draw batches of images, and yield (indices of the images, convert(images)) for each batch.

    If memory runs out, batches are halved as in `in_batches`. Each image has its own random generator, so the size of
    the batches changes the images only by round-off.

    Args:
        batches: the indices of the images of each batch.
        convert: a function of the images of a batch, float32 (B, C, H, W) in [-1, 1] on the UNet's device.
        most: draw at most this many images together.
        on_step: called after every step of every batch, as in `Sampler.draw`.
        progress: whether to show a progress bar.
    """
    num_images, drawn = sum(map(len, batches)), 0
    # Steps count as parts of images, so that the bar moves during a batch.
    layout = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    bar_options = {"total": num_images, "unit": "image", "bar_format": layout, "disable": not progress}
    with tqdm(desc=f"Sampling {num_images:,} images", **bar_options) as bar:

        def draw(batch: Sequence[int]):
            def count(i, num_steps, *step):
                bar.update(drawn + len(batch) * (i + 1) / num_steps - bar.n)
                if on_step is not None:
                    on_step(i, num_steps, *step)

            return convert(sampler.draw(model, batch, count))

        for batch, images in in_batches(draw, batches, most):
            drawn += len(batch)
            yield batch, images
