"""Draw images from a model in Python: as PIL images, as a tensor, or into a folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..memory import ranges
from ..models.pretrained import Pretrained, load_pretrained
from ..pictures import to_pil, to_uint8
from ..processes import gather_in_order
from .batches import batch_size_of, draw_in_batches
from .sample_set import check_count, draw_samples
from .samplers import image_shape
from .settings import Sampler, sampler_named


def sample(
    model: str | Path | Pretrained,
    num_images: int = 16,
    sampler: str | Sampler = "ddpm",
    *,
    output: str | Path | None = None,
    pixel_type: str | None = None,
    batch_size: int | str = 64,
    **settings,
) -> list[Image.Image | np.ndarray] | Path:
    """Draw images 0 to num_images - 1 of a model. Return them as PIL images, or write them to `output`.

    Image k is drawn from a random generator seeded with seed + k. Up to round-off, image k is therefore the same in
    every batch and on every machine.

    Args:
        model: a folder, a checkpoint, a Hub id, or what `load` returned.
        sampler: ddpm, ddim, dpmsolver++ or a `Sampler`.
        output: a folder to write the images to, or a file whose name ends in .npz. After an interruption, repeat
            the call: it draws only the missing images.
        pixel_type: the type of the pixels in `output`: uint8, uint16 or float32. uint16 and float32 pixels are scaled
            to the --pixel_range of the training. None: float32 for a model that was trained with
            --preserve_input_precision, else uint8.
        batch_size: images per batch, at least 1. "auto": up to 512 on a GPU, 64 elsewhere. If memory runs out, batches
            are halved. The batch size changes the images only by round-off.
        settings: the other fields of `Sampler`: num_inference_steps, seed, eta, class_labels, size, ...

    Returns:
        Images of mode L, LA, RGB or RGBA, or the path of `output`. Images of 5 or more channels are arrays, uint8
        (H, W, C).

    Raises:
        UserError: if the model cannot be read or does not support the settings, or if `output` holds other files.

    Example:
        >>> images = ddpm_hf.sample("runs/digits", 4, "ddim", num_inference_steps=10, seed=1)
        >>> len(images), images[0].size
        (4, (8, 8))
    """
    if not isinstance(model, Pretrained):
        model = load_pretrained(model)
    resolved = sampler_named(sampler, settings).resolve(model)
    if output is not None:
        return draw_samples(model, resolved, num_images, output, batch_size=batch_size, pixel_type=pixel_type)
    num_images = check_count(num_images)
    model.unet.to(PartialState().device)
    images = sample_images(model, resolved, range(num_images), batch_size=batch_size)
    return to_pil(images) if images.shape[1] <= 4 else list(images.permute(0, 2, 3, 1).numpy())


def sample_images(
    model: Pretrained,
    sampler: Sampler,
    indices: Sequence[int],
    *,
    batch_size: int | str,
    on_step: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Draw the images numbered `indices` in batches, and return them as uint8 (N, C, H, W) on the CPU.

    Args:
        sampler: a resolved `Sampler`.
        batch_size: images per batch, or "auto", as in `sample`.
        on_step: called after every step of every batch, as in `Sampler.draw`.

    Raises:
        UserError: for a batch size below 1, or if memory runs out for a single image.
    """
    images = torch.empty(len(indices), *image_shape(model.unet, sampler.size), dtype=torch.uint8)
    batches = [
        indices[rows.start : rows.stop] for rows in ranges(len(indices), batch_size_of(batch_size, len(indices)))
    ]
    drawn = 0
    for batch, pixels in draw_in_batches(model, sampler, batches, to_uint8, on_step=on_step, progress=progress):
        images[drawn : drawn + len(batch)] = pixels
        drawn += len(batch)
    return images


def sample_together(
    model: Pretrained, sampler: Sampler, num_images: int, *, batch_size: int, on_step: Callable | None
) -> torch.Tensor:
    """Draw images 0..num_images-1 on all processes together, and return them on every process, as uint8 (N, C, H, W).

    Every process must call this function, and draws a share of the images. The arguments are those of `sample_images`.
    """
    state = PartialState()
    share = range(state.process_index, num_images, state.num_processes)
    options = {"batch_size": batch_size, "on_step": on_step, "progress": state.is_main_process}
    images = sample_images(model, sampler, share, **options)
    return torch.from_numpy(np.stack(gather_in_order(share, images.numpy())))
