"""Find the files to restore, and their masks, and read them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.decode import open_image, to_array, use_path
from ..data.folders import image_files
from ..errors import UserError
from .masks import find_mask, read_mask


@dataclass
class Item:
    """One image to restore. `check_items` fills in its size, and the share of its pixels that a mask marks."""

    index: int
    path: Path
    output: Path
    mask: Path | None  # for inpaint
    size: tuple[int, int] = (0, 0)  # (H, W)
    painted: float | None = None  # the share of pixels to paint, 0 to 1
    pixel_range: tuple[float, float] | None = None  # the values of black and white, see data/decode.py


def find_items(place: Path, output: Path, mask: str | Path | None) -> list[Item]:
    """Return a list: an Item for an image file, or an Item per image directly in a folder, ordered by file name."""
    if place.is_file():
        if output.resolve() == place.resolve():
            raise UserError(f"OUTPUT {output} is the same file as INPUT: give another name as OUTPUT.")
        if output.suffix not in (".png", ".npy") or output.is_dir():
            raise UserError(
                f"OUTPUT {output} cannot be the file of a result: give a name ending in .png, or in .npy if the "
                "images have 5 or more channels."
            )
        return [Item(0, place, output, find_mask(place, mask, output))]
    if not place.is_dir():
        raise UserError(f"INPUT {place} is neither a file nor a folder: give an image or a folder of images.")
    if output.is_file() or output.resolve() == place.resolve():
        raise UserError(f"OUTPUT {output} is a file or the same folder as INPUT: give another folder as OUTPUT.")
    paths = image_files(place, arrays=True)
    if not paths:
        raise UserError(
            f"INPUT {place} has no image directly inside (subfolders are not searched): give an image, or a folder "
            "with images."
        )
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"INPUT {place} has several images named {min(twice)}, and all their results would be {min(twice)}.png: "
            "rename these images."
        )
    results = [output / f"{path.stem}.png" for path in paths]
    masks = [find_mask(path, mask, result) for path, result in zip(paths, results)]
    return [Item(k, *item) for k, item in enumerate(zip(paths, results, masks))]


def read(path: Path, pixel_range: tuple[float, float] | None, channels: int = 3) -> torch.Tensor:
    """Read an image as float32 (C, H, W) in [0, 1], and turn it upright.

    If `channels` is 1 or 3, C is 1 for a grey image and 3 for a color image, and transparent areas become white. For
    other `channels`, C is `channels`. `pixel_range` has the values of black and white, see data/decode.py.
    """
    wanted = 3 if channels == 1 else channels
    array = use_path(lambda image: to_array(image, wanted, exact=True, pixel_range=pixel_range), path, open_image)
    image = torch.from_numpy(np.array(array)).permute(2, 0, 1)
    return image[:1] if channels in (1, 3) and (image == image[:1]).all() else image


def read_for(pipeline, item: Item, task: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read the image and the mask of an item. The image has the channels that the task and the model need.

    Returns:
        The image (C, H, W), and the mask (H, W) or None.
    """
    image = read(item.path, item.pixel_range, pipeline.unet.config.in_channels)
    channels = 1 if task == "colorize" else pipeline.unet.config.in_channels
    if len(image) > channels:
        why = "colorize takes grey images" if task == "colorize" else "the model has images of one channel"
        raise UserError(f"{item.path} has colors, but {why}: convert this image to grey, or remove it.")
    mask = None if item.mask is None else read_mask(item.mask)
    if mask is not None and mask.shape != image.shape[1:]:
        mask_size, size = (f"{width}x{height}" for height, width in (mask.shape, image.shape[1:]))
        raise UserError(
            f"--mask {item.mask} is {mask_size}, but {item.path.name} is {size}: give a mask of the size of the image."
        )
    return image.expand(channels, -1, -1), mask
