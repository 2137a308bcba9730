"""Find and read the masks of inpainting: which pixels of an image are marked for painting."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.arrays import upright
from ..data.decode import opacity, to_array, use_path
from ..data.folders import image_files
from ..errors import UserError


def find_mask(path: Path, mask: str | Path | None, output: Path) -> Path | None:
    """Return the mask of the image `path`: the file `mask`, or the file of the same name in the folder `mask`.

    If `mask` is None, return None.

    Raises:
        UserError: if there is not exactly one mask for the image, or if `output` would replace the mask.
    """
    if mask is None:
        return None
    mask = Path(mask)
    found = [mask]
    if not mask.is_file():
        found = [file for file in image_files(mask) if file.stem == path.stem] if mask.is_dir() else []
    if len(found) != 1:
        raise UserError(
            f"--mask {mask} does not have exactly one mask for {path.name}: give an image, or a folder with one "
            f"{path.stem}.png."
        )
    if output.resolve() == found[0].resolve():
        raise UserError(f"OUTPUT {output} is the same file as the mask: give another OUTPUT.")
    return found[0]


def read_mask(path: Path) -> torch.Tensor:
    """Read a mask file with `painted_pixels`, as bool (H, W). Areas to paint are True.

    Raises:
        UserError: for a file that cannot be read, and for a mask that marks no pixel or all pixels.
    """
    return painted_pixels(use_path(Image.Image.copy, path), f"--mask {path}")


def read_masks_in_memory(mask):
    """Return a mask or a list of masks, with PIL images converted by `painted_pixels`."""
    if isinstance(mask, (list, tuple)):
        return [read_masks_in_memory(one) for one in mask]
    return painted_pixels(mask, "the mask") if isinstance(mask, Image.Image) else mask


def painted_pixels(image: Image.Image, name: str) -> torch.Tensor:
    """Return which pixels a mask marks for painting, bool (H, W).

    If some parts of the mask are more transparent than others, its opaque parts are marked, in any color: editors save
    a layer of brush strokes like this. Otherwise its white parts are marked. A pixel counts as opaque or white if it
    is above half of the highest value in the mask, because some programs write 1 instead of 255.

    Args:
        name: the name of the mask in error messages.

    Raises:
        UserError: for a mask that marks no pixel or all pixels.
    """
    image = upright(image)
    values, mark, unmarked = opacity(image), "opaque", "transparent"
    if values is None or 0 < values.min() == values.max():
        mark, unmarked = "white", "black"
        if image.mode[0] in "IF":  # integers or floats on any scale
            values = np.nan_to_num(np.asarray(image))
        else:  # in float64, the mean of three equal values is exactly this value
            values = to_array(image, 3, exact=True).astype(np.float64).mean(axis=-1)
    advice = f"give a mask that is {mark} in the areas to paint, and {unmarked} elsewhere"
    painted = values > max(values.max() / 2, 0)
    if not painted.any():
        raise UserError(f"{name} is {unmarked} everywhere, so there is nothing to paint: {advice}.")
    if painted.all():
        raise UserError(f"{name} marks the whole image, so nothing of it would be kept: {advice}.")
    return torch.from_numpy(painted)
