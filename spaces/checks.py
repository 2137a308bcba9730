"""Check a visitor's input, and format numbers for the page."""

import math
import os
import time
from pathlib import Path


MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 10


class Refused(Exception):
    """The input is invalid. The message is one sentence for the visitor, or for the person who starts the Space."""


def whole(name: str, value, low: int, high: int) -> int:
    """Return `value` as a whole number from low to high, or raise Refused."""
    return int(between(name, value, low, high, kind=int))


def between(name: str, value, low: float, high: float, *, kind: type = float) -> float:
    """Return `value` as a number from low to high, or raise Refused."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or kind(value) != value:
        wanted = "whole number" if kind is int else "number"
        raise Refused(f"The {name} is {str(value)[:40]!r}: give a {wanted} from {low} to {high}.")
    return kind(value)


def one_of(name: str, value, choices) -> str:
    """Return `value` if it is one of the choices, or raise Refused."""
    if value not in choices:
        raise Refused(f"The {name} is {str(value)[:40]!r}: choose {', '.join(choices)}.")
    return value


def request_seconds() -> float:
    """Return how long one request may take, from DDPM_REQUEST_SECONDS, or raise Refused."""
    given = os.environ.get("DDPM_REQUEST_SECONDS", "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:  # false for nan too
        wanted = "a number of seconds above 0 and up to 86,400"
        raise Refused(f"DDPM_REQUEST_SECONDS is {given!r}: give {wanted}, or do not set it.")
    return seconds


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def seconds_since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def time_left(start: float, done: int, total: int) -> str:
    """Return how long a job that began at `start` still takes, after `done` of `total` equal steps."""
    seconds = (time.perf_counter() - start) / done * (total - done)
    return f"about {seconds:.0f} s left" if seconds >= 1.5 else "about 1 s left"


def default_model(folder: Path) -> str | None:
    """Return the model that the page shows if DDPM_MODEL is not set: the one in examples/mnist, if it is there.

    `folder` is the folder of app.py. On the Hub there is no examples/ beside it.
    """
    model = folder.parent / "examples" / "mnist"
    return str(model) if (model / "model_index.json").is_file() else None
