"""Decode images to arrays: turn them upright, put them on white, scale, resize, crop and mirror them.

An item is a pair `(row number, encoded image)`. An encoded image is a dict `{"bytes": ..., "path": ...}`, as in
`datasets`.
"""

import functools
import io
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ..errors import UserError
from ..memory import ranges
from ..randomness import draws_for, keyed_generator
from ..sizes import read_size
from .arrays import MAGIC, pages_as_channels, read_npy, upright, white_of
from .folders import printable


FLIP_BLOCK = 4096  # flips are drawn in blocks of this many consecutive images
# Seconds per image. If decoding takes less, we use no threads, because they would cost more time than they save.
THREADS_PAY_FROM = 2e-3
MAX_ASPECT = 16  # if an image is longer than this many times its shorter side, its ends are cut off
CHUNK = 256  # number of rows that are read from the dataset at once


def opacity(image):
    """Return how opaque each pixel of a Pillow image is, uint8 (H,W); None if the image has no transparency."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # a 16-bit PNG can declare one grey value transparent; Pillow does not apply it
        return np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def open_image(file, pages=None):
    """Return the image in a file: an array (H,W,C) for .npy, else a Pillow image.

    Args:
        pages: "channels" returns all pages of an image file as one array, the channels of the first page first. With
            another value, only the first page is used.
    """
    start = file.read(len(MAGIC))
    file.seek(0)
    if start == MAGIC:
        return read_npy(file)
    image = Image.open(file)
    return pages_as_channels(image) if pages == "channels" else image


def to_array(image, channels=None, exact=False, pixel_range=None):
    """Return an image as an upright array (H,W,C) with C = `channels`.

    The array is uint8. 16-bit and float values are rounded to 8 bits. With `exact`, the array is float32 in [0, 1] and
    is not rounded. But Pillow itself opens 16-bit *color* images as 8-bit.

    Args:
        image: a Pillow image, or an array (H,W,C).
        channels: for a Pillow image: 1 (grey), 2 (grey and opacity), 3 (RGB) or 4 (RGBA); None: 3. With 1 or 3,
            transparent parts become white. For an array: None, or the number of channels that it has. An array of one
            channel can also become 3 equal channels.
        pixel_range: the values of black and white in images of more than 8 bits. None: 0 and 65535 for integers, 0
            and 1 for floats.

    Raises:
        UserError: if a value is not finite or outside `pixel_range`, or if `channels` does not suit the image.
    """
    if isinstance(image, np.ndarray):
        return _array_to_array(image, channels, exact, pixel_range)
    channels = channels or 3
    image = upright(image)
    if channels > 4 or channels in (2, 4) and (image.mode.startswith("I") or image.mode == "F"):
        raise UserError(
            f"it is a picture of mode {image.mode}, but images of {channels} channels are wanted: give "
            f"{'' if channels > 4 else '8-bit pictures, or '}.npy files with arrays of height x width x {channels}."
        )
    if channels in (2, 4):
        array = np.asarray(image.convert("LA" if channels == 2 else "RGBA"))
        return array.astype(np.float32) / 255 if exact else array
    if image.mode.startswith("I") or image.mode == "F":  # convert("L") would clip their values at 255
        array = np.asarray(image)
        if image.has_transparency_data:
            white = white_of(array.dtype) if pixel_range is None else pixel_range[1]
            array = np.where(opacity(image), array, white)
        array = _to_scale(array, exact, pixel_range)
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")
        array = np.asarray(image.convert("L") if channels == 1 or image.mode == "1" else image)
        array = array.astype(np.float32) / 255 if exact else array
    return array if array.ndim == 3 else np.repeat(array[..., None], channels, axis=-1)


def _array_to_array(array, channels, exact, pixel_range):
    """Do what `to_array` does, for an array."""
    given = array.shape[-1]
    if given == 1 and channels == 3:
        array = np.repeat(array, 3, axis=-1)
    elif channels not in (None, given):
        raise UserError(
            f"it is an array of {given} channels (its shape {array.shape} is height x width x channels), but images "
            f"of {channels} are wanted: give --channels {given}, or other images."
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255 if exact else array
    return _to_scale(array, exact, pixel_range)


def _to_scale(array, exact, pixel_range):
    """Return an array of any type, scaled so that `pixel_range` becomes 0 to 255 (uint8), or 0 to 1 with `exact`.

    With `exact`, the array is float32. If `pixel_range` is None, it is 0 to `white_of`.

    Raises:
        UserError: if a value is not finite or outside `pixel_range`.
    """
    black, white = pixel_range or (0, white_of(array.dtype))
    low, high = array.min(), array.max()
    if not np.isfinite([low, high]).all():
        raise UserError("it has values that are nan or infinite: replace them by numbers, or remove the image.")
    if not black <= low <= high <= white:
        raise UserError(
            f"its values are {low:.10g} to {high:.10g}, not within {black:.10g} (black) to {white:.10g} (white): "
            "rescale all images, or train with values of black and white that fit all of them, e.g. "
            f"--pixel_range={min(black, low):.10g},{high:.10g}."
        )
    if pixel_range is not None:
        array = array.astype(np.float64) - black
    array = array / (white - black)
    return array.astype(np.float32) if exact else np.rint(array * 255).astype(np.uint8)


def read_image(item, channels, resolution, exact, *, pixel_range=None, pages=None):
    """Decode an item with `to_array`, and resize it with antialiasing to the smallest size that covers `resolution`.

    The image becomes exactly as high or exactly as wide as `resolution`, and its other side is not shorter than in
    `resolution`. The ends of a very long image are cut off first, because to resize the whole image could need
    gigabytes. At `resolution` 256, for example, an image of 60,000 x 1 pixels would become 4 billion pixels.
    """

    def decode(file):
        image = open_image(file, pages)
        has_alpha = channels in (2, 4) and not isinstance(image, np.ndarray)
        return to_array(image, channels, exact, pixel_range), has_alpha

    array, has_alpha = use_file(decode, item)
    high, wide = read_size(resolution)
    tallest = -(-MAX_ASPECT * array.shape[1] * high // wide)
    widest = -(-MAX_ASPECT * array.shape[0] * wide // high)
    top, left = (max(0, side - longest) // 2 for side, longest in zip(array.shape[:2], (tallest, widest)))
    array = array[top : top + tallest, left : left + widest]
    # Divide by the side that fits exactly, so that rounding cannot change it.
    wanted, given = (
        (high, array.shape[0]) if high * array.shape[1] >= wide * array.shape[0] else (wide, array.shape[1])
    )
    height, width = (round(side * wanted / given) for side in array.shape[:2])
    if (height, width) == array.shape[:2]:
        return array
    if not has_alpha:
        return _resize(array, (width, height), 1 if exact else 255)
    # Weight colors by their opacity, so that the hidden colors of transparent parts do not bleed into visible ones.
    array = array.astype(np.float32) / (1 if exact else 255)
    weighted = np.concatenate([array[..., :-1] * array[..., -1:], array[..., -1:]], axis=-1)
    resized = _resize(weighted, (width, height), np.inf)
    color = resized[..., :-1] / resized[..., -1:].clip(1e-6)
    resized = np.concatenate([color, resized[..., -1:]], axis=-1).clip(0, 1)
    return resized if exact else np.rint(resized * 255).astype(np.uint8)


def _resize(array, size, white):
    """Return an array (H,W,C) resized to `size` (width, height) with antialiasing."""
    planes = [Image.fromarray(plane) for plane in np.moveaxis(array, -1, 0)]
    planes = [plane.resize(size, Image.Resampling.LANCZOS) for plane in planes]
    return np.stack(planes, axis=-1).clip(0, white)  # Lanczos overshoots the range at edges


def _crop(array, size, crop_generator=None, mirror=False):
    """Return the image (C,H,W): mirrored if `mirror`, then cropped to `size` at a random place or in the middle."""
    if mirror:
        array = array[:, ::-1]
    spare = [length - side for length, side in zip(array.shape[:2], size)]
    if crop_generator is None:
        top, left = (n // 2 for n in spare)
    else:
        top, left = (int(torch.randint(n + 1, (), generator=crop_generator)) for n in spare)
    return np.moveaxis(array[top : top + size[0], left : left + size[1]], -1, 0)


def scale(images):
    """Return uint8 images, or float32 images in [0, 1], as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images * 2 - 1


def draw_augmentations(ordinals, config, random_crop):
    """Return the random arguments `crop_generators` and `mirrored` of `read_batch`, for images with these ordinals."""
    generators = [keyed_generator(config.seed, "augment", n) for n in ordinals] if random_crop else None
    mirrored = draws_for(ordinals, flips, config.seed, FLIP_BLOCK) if config.random_flip else None
    return {"crop_generators": generators, "mirrored": mirrored}


def read_batch(items, read, size, crop_generators=None, mirrored=None):
    """Decode items with `read`, and crop them to `size` (H,W). Return (B,C,H,W) float32 in [-1, 1].

    Args:
        crop_generators: one generator per image, to draw the place of its crop. With None, the middle is kept.
        mirrored: (B,) bool, True for each image to mirror before the crop. With None, no image is mirrored.
    """
    with ThreadPoolExecutor(1 if get_worker_info() else None) as pool:  # Pillow decodes outside the GIL
        mirrored = repeat(False) if mirrored is None else mirrored
        images = map(_crop, pool.map(read, items), repeat(size), crop_generators or repeat(None), mirrored)
        return scale(torch.from_numpy(np.stack(list(images))))


def decode_all(rows, read, center_crop, pixels):
    """Decode all rows into `pixels` (N,C,H,W). Return them as a tensor, or None if an image needs a random crop."""
    started = time.perf_counter()
    read(next(undecoded(rows, [0])))
    is_fast = time.perf_counter() - started < THREADS_PAY_FROM
    with ThreadPoolExecutor() as pool, tqdm(desc="reading", total=len(rows), unit=" images", disable=None) as bar:
        for chunk in ranges(len(rows), CHUNK):
            items = undecoded(rows, chunk)
            arrays = list(map(read, items) if is_fast else pool.map(read, items))
            if not center_crop and any(array.shape[:2] != pixels.shape[2:] for array in arrays):
                return None
            pixels[chunk.start : chunk.stop] = [_crop(array, pixels.shape[2:]) for array in arrays]
            bar.update(len(arrays))
    return torch.from_numpy(pixels)


def use_items(use, rows, title, unit):
    """Return `use(item)` for each row, in a list. It is called on threads, and a progress bar is shown."""
    results = []
    with ThreadPoolExecutor() as pool, tqdm(desc=title, total=len(rows), unit=unit, disable=None) as bar:
        for chunk in ranges(len(rows), CHUNK):  # one call of `map` would read all items into memory
            results += pool.map(use, undecoded(rows, chunk))
            bar.update(len(chunk))
    return results


def undecoded(rows, indices):
    """Yield the item of each row in `indices`. `CHUNK` rows are read at a time."""
    for start in range(0, len(indices), CHUNK):
        chunk = rows[[int(index) for index in indices[start : start + CHUNK]]]
        yield from zip(chunk["row"], chunk["image"])


def use_file(use, item):
    """Return `use(file)` for the image file of an item. Any error becomes a UserError with the row and the path."""
    row, encoded = item[0], item[1] or {"bytes": None, "path": None}
    try:
        if encoded["bytes"] is None and encoded["path"] is None:
            raise OSError("it is missing")
        if encoded["bytes"] is not None:
            return use(io.BytesIO(encoded["bytes"]))
        check_regular(encoded["path"])
        # The path of a stream can point to the Hub or into an archive. In the path of a file, :: has no meaning.
        opener = open if os.path.isfile(encoded["path"]) else fsspec.open
        with opener(encoded["path"], "rb") as file:
            return use(io.BytesIO(file.read()))
    except Exception as error:
        name = f"image {row} ({encoded['path'] or 'without a name'})"
        raise _cannot_be_read(name, error, "repair or remove it, or skip it with --on_bad_image skip") from error


def _cannot_be_read(name, error, advice) -> UserError:
    if isinstance(error, UserError):  # its message already contains advice
        return UserError(f"{name} cannot be read: {error}")
    return UserError(f"{name} cannot be read ({short_reason(error)}): {advice}.")


def short_reason(error) -> str:
    """Return the message of an error without its full stop, and without Pillow's ` <_io.BytesIO object at ...>`."""
    return str(error).split(" <_io")[0].rstrip(".")


def check_regular(path):
    """Raise an OSError if a path is not a regular file. Do not open it, because reading a pipe might never end."""
    if os.path.isfile(path):
        return
    for part in str(path).split("::"):  # e.g. zip://a.png::/data/images.zip
        local = part.removeprefix("file://")
        if os.path.exists(local) and not os.path.isfile(local):
            raise OSError("it is not a regular file")


def item_name(item) -> str:
    """Return the name of an item for messages: its row and its file name, but not the folder, which may be private."""
    row, encoded = item
    path = encoded and encoded["path"]
    return f"image {row} ({printable(Path(path).name)})" if path else f"image {row}"


def use_path(use, path, open_file=Image.open):
    """Open an image file of this machine, and return `use(image)`.

    Args:
        open_file: `Image.open`, or `open_image` to open .npy files too.

    Raises:
        UserError: if the file cannot be read, or if it has more pixels than Pillow's `MAX_IMAGE_PIXELS`.
    """
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open(path, "rb") as file:
                return use(open_file(file))
    except Exception as error:  # Pillow's decoders raise anything for a broken file
        raise _cannot_be_read(path, error, "repair or remove it") from error


@functools.lru_cache(maxsize=2)
def flips(seed: int, block: int, count: int) -> torch.Tensor:
    """Return a bool tensor (count,) for the images of a block: True for each image to mirror."""
    return torch.randint(2, (count,), generator=keyed_generator(seed, "flip", block)).bool()
