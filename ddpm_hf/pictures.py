"""Turn tensors into pictures: sheets, strips and PNG files."""

import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError
from .files import write_beside, writing


GAP = 4  # white pixels between images
MOST_CHANNELS = 8  # shown side by side
LABEL_HEIGHT = 24  # pixels of a row with a label


def save_picture(write, path, **options) -> Path:
    """Write a picture to `path` and return the path. A kill leaves no half-written picture there.

    `write(path, format=..., **options)` writes the file, e.g. the `save` method of a PIL image.

    Raises:
        UserError: if the picture cannot be written.
    """
    path = Path(path)
    with writing("a picture", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Give the format, because the temporary name ends in .tmp.
        write_beside(path, partial(write, format=path.suffix[1:], **options))
    return path


def evenly(items: list, most: int) -> list:
    """Return at most `most` of the items, evenly spaced, including the first and the last."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Scale uint8 images (N, C, H, W) by a whole factor so that the longer side is at most `size` pixels.

    To enlarge, each pixel is repeated to fill a square. To reduce, each square block of pixels is replaced by its
    mean.
    """
    side = max(images.shape[-2:])
    if side > size:
        return torch.nn.functional.avg_pool2d(images.float(), math.ceil(side / size)).round().to(torch.uint8)
    return images.repeat_interleave(size // side, dim=-2).repeat_interleave(size // side, dim=-1)


def side_by_side(images: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, H, W) of any number of channels as grey or RGB images, to look at them.

    Images of 1 or 3 channels are returned as they are. With 4 channels, the first three are a color image, and the
    fourth is a grey image to its right. Otherwise each channel is a grey image, from left to right. Of more than 8
    channels, 8 evenly spaced ones are shown.
    """
    if images.shape[1] in (1, 3):
        return images
    if images.shape[1] == 4:
        return torch.cat([images[:, :3], images[:, 3:].expand(-1, 3, -1, -1)], dim=-1)
    return torch.cat([images[:, k : k + 1] for k in evenly(range(images.shape[1]), MOST_CHANNELS)], dim=-1)


def near_square(count: int) -> int:
    """Return the number of columns of a nearly square sheet of `count` images. If possible, the last row is full."""
    root = math.ceil(count**0.5)
    return next((columns for columns in range(root, 2 * root) if count % columns == 0), root)


def tile(images: torch.Tensor, columns: int) -> Image.Image:
    """Lay out uint8 images (N, C, H, W) in rows on white, and return this picture, of mode L or RGB."""
    count, channels, height, width = images.shape
    size = math.ceil(count / columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP
    canvas = np.full((*size, channels), 255, dtype=np.uint8)
    for k, image in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
        top, left = k // columns * (height + GAP), k % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def image_sheet(images: torch.Tensor, path, columns: int | None = None) -> Path:
    """Write uint8 images (N, C, H, W) as one sheet, by default nearly square. Return the sheet's path.

    See `side_by_side` for images that are neither grey nor RGB.
    """
    images = side_by_side(images)
    big = resize(images, max(128, *images.shape[-2:]))
    return save_picture(tile(big, columns or near_square(len(big))).save, path, optimize=True)


def check_sheet(sheet: Path, output: Path):
    """Raise a UserError if writing `sheet`, the picture of all images in `output`, would replace a file of the user.

    If `sheet` exists but `output` does not, the file `sheet` is the user's.
    """
    if os.path.lexists(sheet) and not os.path.lexists(output):
        raise UserError(
            f"{sheet} already exists, and the sheet of {output} would replace it: give another output, or "
            "move this file."
        )


def frame(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Return a white rectangle, uint8 (3, height, width), with the image in its middle.

    The image is enlarged by the largest whole factor that fits.
    """
    page = Image.new("RGB", (width, height), "white")
    factor = min(width // image.width, height // image.height)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def strip(rows: list[torch.Tensor], column_labels: list[str], row_labels: list[str], path) -> Path:
    """Write rows of uint8 images (K, C, H, W), with labels above the columns and left of the rows. Return the path."""
    rows = [side_by_side(resize(row, 128)) for row in rows]
    missing = max(0, LABEL_HEIGHT - rows[0].shape[-2]) if row_labels else 0
    rows = [torch.nn.functional.pad(row, (0, 0, missing // 2, missing - missing // 2), value=255) for row in rows]
    body = tile(torch.cat(rows), len(column_labels))
    font = ImageFont.load_default(18)
    top, left = 32, max(math.ceil(font.getlength(label)) for label in row_labels) + 16 if row_labels else 0
    page = Image.new(body.mode, (body.width + left, body.height + top), "white")
    page.paste(body, (left, top))
    draw = ImageDraw.Draw(page)
    height, width = rows[0].shape[-2:]
    for k, label in enumerate(column_labels):
        draw.text((left + k * (width + GAP) + width / 2, top / 2), label, "black", font, "mm")
    for k, label in enumerate(row_labels):
        draw.text((left - 10, top + k * (height + GAP) + height / 2), label, "black", font, "rm")
    return save_picture(page.save, path, optimize=True)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8, rounded to the nearest level and clamped; shape and device stay the same.

    Raises:
        UserError: if a pixel is nan or infinite, because it would become black or white.
    """
    if not images.isfinite().all():
        raise UserError(
            "the images have pixels that are nan or infinite, so they are not written: compute in float32, "
            "or check whether the training of this model diverged."
        )
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Return images (B, C, H, W), uint8 or floats in [-1, 1], as PIL images: L, LA, RGB, RGBA for C = 1, 2, 3, 4."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(image.squeeze(-1).numpy()) for image in images.permute(0, 2, 3, 1).cpu()]
