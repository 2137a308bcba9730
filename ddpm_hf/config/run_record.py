"""Read train_config.json, the record of a run. Its entries are checked, because a download may contain any file."""

import dataclasses
from pathlib import Path

from ..errors import UserError
from ..files import read_json
from .fields import allowed, fits
from .training_config import TrainingConfig


SCALARS = (str, int, float, type(None))
# The allowed types of the entries that we read. Other entries are not checked.
KINDS = {"flags": (dict,), "class_names": (list, type(None)), "unet": (dict,)}
KINDS |= dict.fromkeys(["base_model", "scheduler"], (dict, type(None)))
KINDS |= dict.fromkeys(["command", "git_commit"], (str, type(None)))
KINDS |= dict.fromkeys(["parameters", "num_images", "num_processes", "device", "processor"], SCALARS)


def read_run(folder: str | Path) -> dict:
    """Return the content of a folder's train_config.json, or {} if there is no such file.

    Raises:
        UserError: if the file is not JSON, or if one of its entries has a wrong type.
    """
    path = Path(folder, "train_config.json")
    run = read_json(path, missing={})
    flags = run.get("flags", {})
    odd = [name for name, kinds in KINDS.items() if name in run and not isinstance(run[name], kinds)]
    if not odd:
        odd += ["class_names"] * (not all(isinstance(name, str) for name in run.get("class_names") or []))
        odd += [
            f"flags.{field.name}"
            for field in dataclasses.fields(TrainingConfig)
            if field.name in flags and not _could_be(flags[field.name], field.type)
        ]
    if odd:
        raise UserError(
            f"{path} was not written by a run, because its entry {odd[0]} has a wrong type: remove this file."
        )
    return run


def _could_be(value, annotation) -> bool:
    """Return whether the type of `value` fits `annotation`, the type of a flag.

    For a flag with a list of choices, any word or number is accepted, because earlier versions had other choices.
    """
    if isinstance(value, list):
        return all(isinstance(part, (str, int, float)) for part in value)
    kinds, choices = allowed(annotation)
    return any(fits(value, kind) for kind in {*kinds, *map(type, choices)})
