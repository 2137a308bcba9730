"""Records of evaluations: make, write, read and print them."""

import hashlib
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from ..errors import UserError, reason_of
from ..files import read_json, write_json, writing
from ..provenance import command, version
from ..sizes import write_size


EVALUATION_SCHEMA = "ddpm_hf.eval/1"
COPYING = (
    "Is the model copying? Yes, if authpct or median_ratio is far below the value of real images, or another "
    "memorization score is far above it."
)
NOTHING_KNOWN = "A model that knows nothing about the images has 8 bits_per_dim, because a pixel value has 8 bits."
PACKAGES = ["ddpm_hf", "torch", "diffusers", "transformers", "numpy", "pillow"]


def make_record(evaluation, entries: list[dict], images: Tensor, cost: dict) -> dict:
    """Return the record of an Evaluation: its scores, and everything that they depend on.

    The record can be published: it contains no tokens and no local paths.

    Args:
        entries: the entries that the metrics returned.
        images: the generated images, uint8 (N, C, H, W); empty if no metric used any.
        cost: the seconds that drawing and scoring took.
    """
    train = evaluation.train
    held_out = evaluation.held_out
    used = {name: module for name, module in evaluation.extractors.items() if not isinstance(module, str)}
    data = {
        "name": evaluation.data_name,
        "class_names": train.class_names,
        "resolution": write_size(train.size),
        "channels": train.channels,
        "train": {"n": len(train), "fingerprint": train.fingerprint},
        "held_out": None if held_out is None else {"n": len(held_out), "fingerprint": held_out.fingerprint},
    }
    if evaluation.reference_file is not None and "inception" in used:
        data["reference_sha256"] = hashlib.sha256(Path(evaluation.reference_file).read_bytes()).hexdigest()
    return {
        "schema": EVALUATION_SCHEMA,
        "command": command(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": evaluation.samples.model if evaluation.model is None else evaluation.model.facts,
        "sampler": evaluation.sampler_record,
        "samples": {"n": len(images), "sha256": hashlib.sha256(images.numpy()).hexdigest()} if len(images) else {},
        "data": data,
        "extractors": {
            name: {"pipeline": module.pipeline, "sha256": module.sha256, "dtype": "float32", "tf32": False}
            for name, module in used.items()
        },
        "metrics": entries,
        "env": {
            "python": platform.python_version(),
            "device": str(PartialState().device),
            "processes": PartialState().num_processes,
            **{package: version(package) for package in PACKAGES},
        },
        "cost": cost,
    }


def data_name(name: str) -> str:
    """Return the name of a data set in a record: a Hub id, or the last part of a local folder's path."""
    return Path(name).resolve().name if Path(name).exists() else name


def write_record(record: dict, path: Path):
    """Write a record as JSON. If writing is interrupted, no incomplete file is left.

    Raises:
        UserError: if the file cannot be written.
    """
    with writing("the record", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def write_new_record(record: dict, path: Path, pairs: Path, overwrite: bool = False) -> Path:
    """Write a record to `path`, or to the first free name after it (x-2.json, x-3.json, ...), and return its path.

    The name is chosen only after the evaluation, so that two evaluations at the same time get different names.

    Args:
        pairs: the path of the picture of the closest pairs, if there is one. The picture gets the name of the record.
        overwrite: replace the record at `path`.

    Raises:
        UserError: if the file cannot be written.
    """
    count, target = 1, path
    with writing("the record", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while not overwrite and not _claim(target):
            count += 1
            target = path.with_stem(f"{path.stem}-{count}")
    sheet = target.with_suffix(".pairs.png")
    for entry in record["metrics"]:
        if "sheet" in entry.get("extra", {}):
            entry["extra"]["sheet"] = sheet.name
    try:
        write_record(record, target)
    except UserError:
        if not overwrite:
            target.unlink(missing_ok=True)
        raise
    try:
        if pairs.exists():
            pairs.replace(sheet)
        else:
            sheet.unlink(missing_ok=True)  # it belongs to the record that was replaced
    except OSError as error:  # the scores are written, so this is not an error of the evaluation
        print(f"Warning: the closest pairs could not be written to {sheet} ({reason_of(error)}).", flush=True)
    return target


def _claim(path: Path) -> bool:
    """Create an empty file for a new record. Return False if the name is taken."""
    if path.with_suffix(".pairs.png").exists():
        return False
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def read_record(path) -> dict:
    """Return the record in a file that `evaluate` wrote.

    Raises:
        UserError: for a file that is not a complete record of the schema EVALUATION_SCHEMA.
    """
    record = read_json(Path(path))
    if not is_record(record):
        raise UserError(f"{path} is not a record of the schema {EVALUATION_SCHEMA}: give one that `evaluate` wrote.")
    return record


def is_record(content: dict) -> bool:
    """Return whether the content of a JSON file is a record, with all fields that are read later."""
    parts = {"model": dict, "sampler": dict, "data": dict, "metrics": list, "cost": dict}
    if content.get("schema") != EVALUATION_SCHEMA or not isinstance(content.get("command", ""), (str, type(None))):
        return False
    if not all(isinstance(content.get(name), kind) for name, kind in parts.items()):
        return False
    data, cost, sampler = content["data"], content["cost"], content["sampler"]
    sets = [data.get("train"), *([] if data.get("held_out") is None else [data["held_out"]])]
    has_data = isinstance(data.get("name"), str) and all(
        isinstance(one, dict) and is_value(one.get("n")) for one in sets
    )
    has_cost = all(is_value(cost.get(name)) for name in ("drawing_s", "scoring_s"))
    is_named = isinstance(sampler.get("method", ""), str) and isinstance(sampler.get("seed"), (int, type(None)))
    samples = content.get("samples", {})
    is_counted = isinstance(samples, dict) and isinstance(samples.get("n", 0), int)
    return has_data and has_cost and is_named and is_counted and all(map(is_entry, content["metrics"]))


def is_entry(entry) -> bool:
    """Return whether a value is a metric's entry in a record. Skipped entries have no numbers, others have all."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return False
    if not isinstance(entry.get("extra", {}), dict) or not isinstance(entry.get("reason"), (str, type(None))):
        return False
    if not isinstance(entry.get("lower_is_better"), (bool, type(None))):
        return False
    numbers = ("value", "se", "floor", "n_gen", "n_ref")
    if entry.get("status") == "skipped":
        return not any(name in entry for name in numbers)
    return all(name in entry and is_value(entry[name]) for name in numbers)


def is_value(value) -> bool:
    """Return True for a number, and for None, which stands in a record for a number that was not measured."""
    return value is None or type(value) in (int, float)


def record_table(record: dict) -> str:
    """Return a record as text: a table of the scores, what its columns mean, then the skipped metrics.

    The scores about copying are at the end of the table, below the text COPYING. Their column "better" is empty.
    """
    rows = [["metric", "value", "+-", "better", "real images", "N", "N real"]]
    measured = [entry for entry in record["metrics"] if entry.get("status") != "skipped"]
    measured.sort(key=lambda entry: is_about_copying(entry["id"]))
    for entry in measured:
        value, error, *rest = (number(entry[key]) for key in ("value", "se", "floor", "n_gen", "n_ref"))
        better = {True: "lower", False: "higher"}.get(entry.get("lower_is_better"), "")
        rows.append([entry["id"], value, error, "" if is_about_copying(entry["id"]) else better, *rest])
    lines = table(rows).splitlines()
    if copying := sum(is_about_copying(entry["id"]) for entry in measured):
        lines.insert(len(lines) - copying, COPYING)
    if measured:
        lines += [
            "+-: standard error. better: whether lower or higher values are better. N: the number of images.",
            "real images: the value of held-out real images (the floor), which a perfect model would reach.",
        ]
    if any(entry["id"] == "bits_per_dim" for entry in measured):
        lines.append(NOTHING_KNOWN)
    missing = [entry for entry in record["metrics"] if entry.get("status") == "skipped"]
    lines += [f"failed: {entry['id']} ({entry['reason']})" for entry in missing if entry.get("failed")]
    if skipped := [entry["id"] for entry in missing if not entry.get("failed")]:
        # `evaluate` has printed the reasons as warnings before.
        lines.append(f"skipped: {', '.join(skipped)}. The warning above and the record say why.")
    return "\n".join(lines)


def is_about_copying(id: str) -> bool:
    """Return whether the score with this id is about copies of training images instead of quality."""
    return id.startswith("memorization_")


def scores_of(record: dict) -> dict[str, float]:
    """Return a dict from the id of each score of a record to its value, without skipped metrics."""
    return {entry["id"]: entry["value"] for entry in record["metrics"] if "value" in entry}


def by_reason(reasons: dict[str, str | None]) -> list[tuple[str, str]]:
    """Return a pair (names of metrics joined by commas, reason) for each reason other than None."""
    found = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
    return [(", ".join(id for id, why in reasons.items() if why == reason), reason) for reason in found]


def number(value) -> str:
    """Return a number for a table: an int in full, a float with four significant digits, None as \"\"."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(rows: list[list[str]], markdown: bool = False) -> str:
    """Return rows as aligned text or as a Markdown table. The first row is the head of the table."""
    if markdown:
        # Escape each |, because it ends a cell, even in code. Drop backslashes before it, which undo the escape.
        lines = ["| " + " | ".join(re.sub(r"\\*\|", r"\\|", cell) for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)
