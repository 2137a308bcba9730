"""Sizes of images, as flags write them: a whole number for a square, HEIGHTxWIDTH for a rectangle."""

import re

from .errors import UserError


def read_size(value, flag: str = "--resolution", least: int = 1, most: int = 8192) -> tuple[int, int]:
    """Return (height, width) of a size. `64` and `"64"` are a square, `"48x64"` and `(48, 64)` a rectangle.

    Args:
        flag: the name of the flag in messages.
        least, most: bounds of both sides, in pixels.

    Raises:
        UserError: if `value` is not a size, or if a side is out of bounds.

    Example:
        >>> read_size("48x64"), read_size(64)
        ((48, 64), (64, 64))
    """
    text = "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip().lower()
    if not re.fullmatch(r"-?[0-9]{1,9}(x-?[0-9]{1,9})?", text):
        raise UserError(
            f"{flag} is {value!r}, but must be one whole number for squares, or HEIGHTxWIDTH for rectangles, e.g. "
            "48x64."
        )
    sides = [int(side) for side in text.split("x")]
    if min(sides) < least:
        raise UserError(f"{flag} is {text}, but must be at least {least}: give a larger number.")
    if max(sides) > most:
        raise UserError(f"{flag} is {text}, but must be at most {most}: give a smaller number.")
    return sides[0], sides[-1]


def write_size(size: tuple[int, int]) -> int | str:
    """Return a size (height, width) as --resolution takes it: 64 for a square, "48x64" for a rectangle."""
    height, width = size
    return height if height == width else f"{height}x{width}"
