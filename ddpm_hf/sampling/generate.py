"""Many images in batches, and how long they take."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from ..diffusion.scheduler import PaperDDPMScheduler
from ..errors import UserError
from ..pictures import to_uint8
from .samplers import _autocast, _class_labels, _image_shape, image_generators, sample


def sample_images(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    seed: int,
    indices: Sequence[int],
    batch_size: int,
    *,
    class_labels: Sequence[int] | torch.Tensor | None = None,  # one per index
    on_step: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None,  # called for every batch
    progress: bool = True,
    **kwargs,
) -> torch.Tensor:
    """Images `indices` of `seed`, drawn in batches with a progress bar: uint8 (N, C, H, W) on the CPU.

    `kwargs` are those of `sample`. The images do not depend on `batch_size`. A batch size below 1 is a UserError.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    images = torch.empty(len(indices), *_image_shape(unet), dtype=torch.uint8)
    starts = range(0, len(indices), batch_size)
    with tqdm(desc=f"Sampling {len(indices)} images", unit="step", disable=not progress) as bar:

        def count_step(i, num_steps, *step):
            bar.total = num_steps * len(starts)
            bar.update()
            if on_step is not None:
                on_step(i, num_steps, *step)

        for start in starts:
            batch = slice(start, start + batch_size)
            labels = None if class_labels is None else class_labels[batch]
            generators = image_generators(seed, indices[batch])
            images[batch] = to_uint8(
                sample(unet, scheduler, generators, class_labels=labels, on_step=count_step, **kwargs)
            )
    return images


def step_seconds(unet: nn.Module, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """Return the seconds that one evaluation of a batch takes here, measured after one to warm up."""
    shape = batch_size, *_image_shape(unet)
    x, timesteps = torch.zeros(shape, device=unet.device), torch.zeros(batch_size, dtype=torch.int64)
    labels = _class_labels(unet, None if unet.config.num_class_embeds is None else [0] * batch_size, batch_size)
    with torch.no_grad(), _autocast(unet, dtype):
        for _ in range(2):
            start = time.perf_counter()
            unet(x.to(unet.dtype), timesteps.to(unet.device), **labels).sample.sum().item()  # waits for a GPU
            seconds = time.perf_counter() - start
    return seconds


def duration(seconds: float) -> str:
    """Return seconds in words of the size that matters: `a second`, `8 s`, `12 min`, `3.5 h`."""
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
