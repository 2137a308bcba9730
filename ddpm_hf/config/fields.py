"""Define flags as dataclass fields with a default, a help text and bounds. Check the values of these fields.

This file does not import torch, because `--help` has to answer quickly.
"""

import dataclasses
import math
import os
import types
from typing import Literal, Union, get_args, get_origin

from transformers.hf_argparser import HfArg

from ..errors import UserError


TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    types.NoneType: "None",
}


def flag(default, help: str, **bounds):
    """Return a dataclass field with a default, a help text and bounds for its value.

    Args:
        bounds: the bounds for `check_bounds`. `at_least` and `at_most` are the smallest and the largest value.
            `fraction=True` means 0 <= value < 1. `positive="e.g. 1e-8"` means value > 0, and the error message ends
            with this text.
    """
    return HfArg(default=default, help=help, metadata=bounds)


def check_types(config):
    """Refuse values of a wrong type. Also turn paths into strings, and replace a leading ~ by the home folder.

    Only Python code can give a wrong type, because argparse converts the flags of a command line.

    Raises:
        UserError: for a wrong type. The message names the flag, the value and what is allowed.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str | os.PathLike):
            value = os.path.expanduser(value)
            setattr(config, field.name, value)
        kinds, choices = allowed(field.type)
        if value not in choices and not any(fits(value, kind) for kind in kinds):
            wanted = [TYPES[kind] for kind in kinds if kind is not types.NoneType] + list(map(str, choices))
            raise UserError(f"--{field.name} is {value!r}, but must be {' or '.join(wanted)}.")


def check_bounds(config):
    """Refuse numbers outside the bounds of their fields.

    Raises:
        UserError: for such a number. The message names the flag, the value and the bound.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        bounds = field.metadata
        if not isinstance(value, int | float):
            continue
        given = f"--{field.name} is {value}, but must"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{given} be a finite number.")
        if "at_least" in bounds and value < bounds["at_least"]:
            raise UserError(f"{given} be at least {bounds['at_least']}: give a larger number.")
        if "at_most" in bounds and value > bounds["at_most"]:
            raise UserError(f"{given} be at most {bounds['at_most']}: give a smaller number.")
        if "fraction" in bounds and not 0 <= value < 1:
            raise UserError(f"{given} lie between 0 and 1 (1 excluded).")
        if "positive" in bounds and value <= 0:
            raise UserError(f"{given} be positive, {bounds['positive']}.")


def allowed(annotation) -> tuple[list[type], list]:
    """Return the types and the choices that an annotation allows: `Literal["a"] | None` gives ([NoneType], ["a"])."""
    kinds = []
    choices = []
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    for part in parts:
        if get_origin(part) is Literal:
            choices += get_args(part)
        else:
            kinds.append(get_origin(part) or part)
    return kinds, choices


def fits(value, kind: type) -> bool:
    """Return whether a field of type `kind` accepts a value. float accepts int; list accepts a tuple or a string."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (float, int), list: (list, tuple, str)}.get(kind, kind))


def split_list(words, kind: type = str, example: str = "") -> list | None:
    """Return the value of a list flag as a list of `kind`, split at commas. None stays None.

    With int, `["1,2", "4"]`, `"1,2,4"` and `(1, 2, 4)` become `[1, 2, 4]`. A blank text becomes `[]`.

    Raises:
        UserError: if a part cannot be read as `kind`. The message ends with `example`.
    """
    if words is None:
        return None
    if isinstance(words, str):
        words = [words]
    parts = [part.strip() for word in words for part in str(word).split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{' '.join(map(str, words))!r} is not a list of {numbers}: write {example}.") from None
