"""Encoded images to arrays: opened, made upright and opaque, scaled, resized, cropped and mirrored."""

import io
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ..errors import UserError


SMALL = 2e-3  # seconds to decode an image: below, threads wait for each other three times as long as they work
CHUNK = 256  # rows that are read together, undecoded


def to_array(image, channels, exact=False):
    """Return a Pillow image as (H,W,C) with C = `channels` (1 or 3), upright, its transparent parts on white.

    It is uint8, to which greys of 16 bit and floats are rounded, or with `exact` float32 in [0, 1], where nothing is
    rounded (but Pillow opens *colours* of 16 bit as 8 bit).

    Raises:
        UserError: for greys that are off their scale.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert("L") would clip these at 255
        array, white = np.asarray(image), 1 if image.mode == "F" else 65535
        if not 0 <= array.min() <= array.max() <= white:
            raise UserError(f"its values are {array.min():g} to {array.max():g}, not within 0 to {white}: rescale it.")
        array = (array / white).astype(np.float32) if exact else np.rint(array / white * 255).astype(np.uint8)
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")
        array = np.asarray(image.convert("L") if channels == 1 or image.mode == "1" else image)
        array = array.astype(np.float32) / 255 if exact else array
    return array if array.ndim == 3 else np.repeat(array[..., None], channels, axis=-1)


def read_image(item, channels, resolution, exact):
    """Return (H,W,C) as `to_array` does, resized with antialiasing until its shorter side is `resolution`."""
    array = use_file(lambda file: to_array(Image.open(file), channels, exact), item)
    height, width = (round(side * resolution / min(array.shape[:2])) for side in array.shape[:2])
    if (height, width) == array.shape[:2]:
        return array
    planes = [Image.fromarray(plane) for plane in np.moveaxis(array, -1, 0)]
    planes = [plane.resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    return np.stack(planes, axis=-1).clip(0, 1 if exact else 255)  # floats overshoot at edges


def _square(array, generator=None, mirror=False):
    if mirror:
        array = array[:, ::-1]
    side = min(array.shape[:2])
    spare = [length - side for length in array.shape[:2]]
    top, left = (int(torch.randint(n + 1, (), generator=generator)) if generator else n // 2 for n in spare)
    return np.moveaxis(array[top : top + side, left : left + side], -1, 0)


def scale(images):
    """Return uint8 pixels, or float32 ones in [0, 1], as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images * 2 - 1


def read_batch(undecoded, read, generators=None, mirrored=None):
    """Decode encoded images to (B,C,H,W) float32 in [-1, 1], cropped as their generators say, mirrored as told."""

    def read_one(item, generator, mirror):
        return _square(read(item), generator, mirror)

    no, none = itertools.repeat(False), itertools.repeat(None)
    with ThreadPoolExecutor(1 if get_worker_info() else None) as pool:  # Pillow decodes outside the GIL
        images = list(pool.map(read_one, undecoded, generators or none, no if mirrored is None else mirrored))
    return scale(torch.from_numpy(np.stack(images)))


def decode_all(rows, read, center_crop, pixels):
    """Fill `pixels` (N,C,H,W) and return it as a tensor; None if there are several ways to crop one of the images."""
    started = time.perf_counter()
    read(next(undecoded(rows, [0])))
    small = time.perf_counter() - started < SMALL
    with ThreadPoolExecutor() as pool, tqdm(desc="reading", total=len(rows), unit=" images", disable=None) as bar:
        for start in range(0, len(rows), CHUNK):
            items = undecoded(rows, range(start, min(start + CHUNK, len(rows))))
            arrays = list(map(read, items) if small else pool.map(read, items))
            if not center_crop and any(array.shape[0] != array.shape[1] for array in arrays):
                return None
            pixels[start : start + CHUNK] = [_square(array) for array in arrays]
            bar.update(len(arrays))
    return torch.from_numpy(pixels)


def undecoded(rows, indices):
    """Yield `(number of the row, encoded image)` for each index, read in chunks."""
    for start in range(0, len(indices), CHUNK):
        chunk = rows[[int(index) for index in indices[start : start + CHUNK]]]
        yield from zip(chunk["row"], chunk["image"])


def use_file(use, item):
    """Return `use(image file)`; whatever goes wrong with a broken file is told with its row and path."""
    row, encoded = item[0], item[1] or {"bytes": b"", "path": None}
    try:
        if encoded["bytes"] is not None:
            return use(io.BytesIO(encoded["bytes"]))
        with fsspec.open(encoded["path"], "rb") as file:  # the paths of a stream may lead to the Hub or into archives
            return use(io.BytesIO(file.read()))
    except Exception as error:
        path, reason = encoded["path"] or "without a name", str(error).split(" <_io")[0].rstrip(".")
        raise UserError(f"image {row} ({path}) cannot be read ({reason}): mend it or take it out.") from error
