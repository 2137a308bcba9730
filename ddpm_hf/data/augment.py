"""Change the geometry of a share of the training images (--augment_probability).

A label tells the UNet which images are changed (see models/augmented.py), so that it generates images without such
changes. The idea is from Karras et al. 2020, https://huggingface.co/papers/2006.06676. Karras et al. 2022,
https://huggingface.co/papers/2206.00364, appendix F.2, apply it to diffusion models. The ranges of the changes are
from this second paper.
"""

import math

import torch
import torch.nn.functional as F

from ..randomness import keyed_generator


LOG2_SCALE = 0.2  # standard deviation of log2 of a scale
SHIFT = 1 / 8  # standard deviation of a shift, as a share of the side


def augment(batch: dict, probability: float, seed: int) -> dict:
    """Return a batch in which each image is changed with `probability`. "augmented" (B,) bool marks changed images.

    The draw for an image is keyed by (seed, ordinal). A changed image is computed alone, so that its pixels do not
    depend on the batch.
    """
    ordinals = batch["ordinals"].tolist()
    generators = [keyed_generator(seed, "geometry", n) for n in ordinals]
    chosen = [float(torch.rand((), generator=generator)) < probability for generator in generators]
    for row, generator in enumerate(generators):
        if chosen[row]:
            image = batch["images"][row : row + 1]
            batch["images"][row] = transform(image, draw_matrix(generator, image.shape[2:]))[0]
    return batch | {"augmented": torch.tensor(chosen)}


def draw_matrix(generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
    """Return a random affine map (2, 3) of an image of height and width `size`, for `torch.nn.functional.affine_grid`.

    The map mirrors with probability 1/2. It scales both sides by 2^x. It stretches one direction by 2^y, and shrinks
    the perpendicular direction by 2^y. It rotates by any angle. It shifts along each side by z times the length of the
    side. x and y are drawn from N(0, 0.2^2), and each z from N(0, (1/8)^2).
    """
    mirror, turn, direction = torch.rand(3, generator=generator).tolist()
    scale, stretch, right, down = torch.randn(4, generator=generator).tolist()
    axis = _rotation(math.pi * direction)
    stretched = axis @ torch.diag(torch.tensor([2.0, 0.5]) ** (LOG2_SCALE * stretch)) @ axis.T
    linear = _rotation(2 * math.pi * turn) @ stretched * 2 ** (LOG2_SCALE * scale)
    linear = linear @ torch.diag(torch.tensor([-1.0 if mirror < 0.5 else 1.0, 1.0]))
    # affine_grid counts from -1 to 1 on each axis, so an image that is not square needs other units.
    sides = torch.tensor([size[1], size[0]], dtype=torch.float32)
    linear = linear * sides / sides[:, None]
    return torch.cat([linear, 2 * SHIFT * torch.tensor([[right], [down]])], dim=1)


def transform(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply an affine map (2, 3) to images (B, C, H, W). Outside its borders, an image continues as in a mirror."""
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _rotation(angle: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
