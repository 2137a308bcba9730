"""Check images before training: skip unreadable images, and warn of likely mistakes in a sample of the images."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import ExifTags

from ..errors import UserError
from .arrays import page_numbers
from .decode import item_name, open_image, short_reason, to_array, use_file, use_items


GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
CROPPED = 0.2  # a crop that cuts off a larger share of the images is worth a hint
DARK = 0.25  # images whose largest value is below this share of the scale are almost black


def skip_unreadable(rows, pixel_range, pages=None):
    """Return the rows whose images can be read, and a list of the other images, each with the reason.

    Every image is decoded once before training, so that the order of the images cannot change during a run. If all
    images can be read, `rows` itself is returned.

    Raises:
        UserError: if no image can be read.
    """
    problems = use_items(partial(_problem, pixel_range=pixel_range, pages=pages), rows, "checking", " images")
    readable = [row for row, problem in enumerate(problems) if problem is None]
    skipped = [problem for problem in problems if problem is not None]
    if not readable and skipped:
        raise UserError(f"none of the {len(rows):,} images can be read ({skipped[0]}): give other images.")
    return rows.select(np.array(readable)) if skipped else rows, skipped


def _problem(item, pixel_range, pages) -> str | None:
    """Return `image 3 (x.png): <reason>` for an image that cannot be read, and None for other images."""
    try:
        use_file(lambda file: to_array(open_image(file, pages), pixel_range=pixel_range), item)
    except UserError as error:
        return f"{item_name(item)}: {short_reason(error.__cause__)}"


def skipped_warning(skipped: list[str]) -> list[str]:
    """Return a list with one warning, which names up to three skipped images. It is empty if no image was skipped."""
    if not skipped:
        return []
    more = f" and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
    return [f"Warning: {len(skipped):,} images cannot be read and are skipped: {'; '.join(skipped[:3])}{more}."]


def survey(items, channels, pixel_range, size, pages=None) -> tuple[int, list[str]]:
    """Return the number of channels to train with, and warnings to print.

    Args:
        items: a sample of the images, see decode.py.
        channels: the number that is wanted. None: for arrays, the number that they have; for pictures, 1 if all
            are grey, else 3.
        pixel_range: see `decode.to_array`.
        size: (H, W) that images are cropped to.
        pages: see `decode.open_image`.

    Raises:
        UserError: for an image that cannot be read, or for arrays that differ in their number of channels.
    """
    kinds = [use_file(partial(_kind, pages=pages), item) for item in items]
    found = {kind.channels for kind in kinds}
    if channels is None and len(found) > 1 and not found <= {1, 3}:
        raise UserError(
            f"the images have different numbers of channels ({', '.join(map(str, sorted(found)))}): give --channels "
            "with one of these numbers, and leave out the arrays with other numbers."
        )
    depths = [kind.depth for kind in kinds]
    is_plain = channels is None and 3 in found and not any(kind.is_array for kind in kinds)
    colored, brightest = _look_at_pixels(items, depths, pixel_range, colored=not is_plain, pages=pages)
    warnings = []
    if not colored:
        warnings.append(
            "Hint: these images are stored in color, but are grey: --channels 1 trains a smaller model, which cannot "
            "tint its images."
        )
    warnings += [_dark_warning(depth, top, pixel_range) for depth, top in brightest.items() if 0 < top < DARK]
    if max(brightest.values()) == 0:
        warnings.append(
            "Warning: all images looked at are black everywhere, so the model would learn only black images."
        )
    elif len(items) > 1 and _are_equal(items, pixel_range, pages):
        warnings.append(
            f"Warning: the {len(items)} images looked at are all the same, so the model would learn only this image."
        )
    warnings += _crop_hint(np.array([kind.size for kind in kinds]), size)
    if several := [item for item, kind in zip(items, kinds) if kind.has_pages]:
        warnings.append(
            f"Warning: {len(several)} of the {len(items)} images looked at have several pages or frames, e.g. "
            f"{item_name(several[0])}. Only the first page is used: to use each page as an image, give --pages all."
        )
    return channels or max(found), warnings


@dataclass(frozen=True)
class Kind:
    """Facts about an image that are known before its pixels are decoded.

    Attributes:
        channels: 1 for a grey picture, 3 for other pictures, and an array's own number.
        depth: "8 bits", "I" (longer integers) or "F" (floats).
        size: height and width, upright.
        has_pages: whether the file has several pages or frames, of which one is used.
        is_array: whether this is an array, not a picture.
    """

    channels: int
    depth: str
    size: tuple[int, int]
    has_pages: bool = False
    is_array: bool = False


def _kind(file, pages) -> Kind:
    image = open_image(file, pages)
    if isinstance(image, np.ndarray):
        depth = "F" if image.dtype.kind == "f" else "8 bits" if image.dtype.itemsize == 1 else "I"
        return Kind(image.shape[2], depth, image.shape[:2], is_array=True)
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by a quarter
    depth = image.mode[0] if image.mode[0] in "IF" else "8 bits"
    shape = image.size[:: 1 if is_turned else -1]
    return Kind(1 if image.mode in GREY_MODES else 3, depth, shape, len(page_numbers(image)) > 1)


def _crop_hint(shapes: np.ndarray, size: tuple[int, int]) -> list[str]:
    """Return [] or a hint that cropping cuts off many pixels, and that rectangles would keep more of the pixels.

    Args:
        shapes: (N, 2), height and width of each image.
        size: (H, W) that they are cropped to.
    """

    def lost(height, width):  # the mean share of pixels that a crop of this shape cuts off
        stretch = (shapes[:, 0] * width) / (shapes[:, 1] * height)
        return 1 - np.minimum(stretch, 1 / stretch).mean()

    shorter, aspect = min(size), float(np.median(shapes[:, 0] / shapes[:, 1]))
    multiple = 2 ** max(0, (shorter // 8).bit_length() - 1)  # so that the sides can be halved about as often
    longer = multiple * round(shorter * max(aspect, 1 / aspect) / multiple)
    better = (longer, shorter) if aspect > 1 else (shorter, longer)
    if shorter < 8 or lost(*size) < CROPPED or lost(*better) > lost(*size) / 2 or longer > 4 * shorter:
        return []
    return [
        f"Hint: the crop to {size[0]}x{size[1]} cuts off {lost(*size):.0%} of the pixels of the images looked at: "
        f"--resolution {better[0]}x{better[1]} (height x width) would keep more of the pixels."
    ]


def _look_at_pixels(items, depths, pixel_range, *, colored: bool, pages) -> tuple[bool, dict]:
    """Return whether any image has colors, and a dict with the largest value (0 to 1) in the images of each depth.

    Most often the first image answers both questions, and the others are not decoded.

    Args:
        depths: the depth of each image (see `Kind`).
        colored: if True, do not look for colors, and return True.
    """
    brightest = dict.fromkeys(depths, 0.0)
    for item, depth in zip(items, depths):
        if colored and brightest[depth] >= DARK:
            continue
        array = use_file(lambda file: to_array(open_image(file, pages), exact=True, pixel_range=pixel_range), item)
        brightest[depth] = max(brightest[depth], float(array.max()))
        colored = colored or bool((array != array[..., :1]).any())
    return colored, brightest


def _are_equal(items, pixel_range, pages) -> bool:
    """Return whether all images have the same pixels. Most often the first two differ, so the others are not read."""

    def read(file):
        return to_array(open_image(file, pages), pixel_range=pixel_range)

    arrays = (use_file(read, item) for item in items)
    first = next(arrays)
    return all(np.array_equal(first, array) for array in arrays)


def _dark_warning(depth: str, top: float, pixel_range) -> str:
    """Return the warning that images are almost black, often because their values fill only a part of the scale."""
    if depth == "8 bits":
        return (
            f"Warning: no pixel of the 8-bit images looked at is brighter than {top:.1%} of white, so the model would "
            "learn almost black images: rescale them."
        )
    black, white = pixel_range or (0, 1 if depth == "F" else 65535)
    largest = black + top * (white - black)
    likely = f"{largest:.4g}" if depth == "F" else 2 ** round(largest).bit_length() - 1  # 4095 for 12 bits
    return (
        f"Warning: the largest value in the images looked at is {largest:.6g}, but white is {white:.10g}, so the "
        "model would learn almost black images: say which values are black and white, e.g. "
        f"--pixel_range={black:.10g},{likely}."
    )
