"""Records of evaluations: written, printed, and compared where their protocols are the same."""

import hashlib
import json
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import EvalResult

from . import UserError
from .checkpoints import write_beside, writing
from .record import command


SCHEMA = "ddpm_hf.eval/1"
PACKAGES = ["ddpm_hf", "torch", "diffusers", "transformers", "numpy", "pillow"]
# What may differ between two records that are compared: who was measured, and what the numbers came to.
# (Networks are in the entries that they were used for.)
NOT_PROTOCOL = [
    "schema",
    "created",
    "command",
    "model",
    "samples",
    "env",
    "cost",
    "extractors",
    "metrics",
    "sampler.seed",
]
# What the Hub calls what our ids begin with.
METRIC_TYPES = {r"fid\d": "fid", r"kid\d": "kid", r"is\d": "inception_score"}
METRIC_TYPES |= {"precision": "precision", "recall": "recall"}


def make_record(evaluation, entries: list[dict], *, model: dict, sampler: dict, data_name: str, cost: dict) -> dict:
    """Return the record of an Evaluation and its scores: whatever a number depends on, and nothing that is private."""
    train, held_out, images = evaluation.train, evaluation.held_out, evaluation.images
    used = {name: module for name, module in evaluation.extractors.items() if not isinstance(module, str)}
    data = {
        "name": data_name,
        "class_names": train.class_names,
        "resolution": train.resolution,
        "channels": train.channels,
        "train": {"n": len(train), "fingerprint": train.fingerprint},
        "held_out": None if held_out is None else {"n": len(held_out), "fingerprint": held_out.fingerprint},
    }
    if evaluation.reference_file is not None and "inception" in used:
        data["reference_sha256"] = hashlib.sha256(Path(evaluation.reference_file).read_bytes()).hexdigest()
    return {
        "schema": SCHEMA,
        "command": command(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": model,
        "sampler": sampler,
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
    """Return the name of a data set as records have it: a Hub id, or the last part of a local folder's path."""
    return Path(name).resolve().name if Path(name).exists() else name


def write_record(record: dict, path: Path):
    """Write a record as JSON, whole or not at all."""
    with writing("the record", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda partial: partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))


def read_record(path) -> dict:
    """Read a record.

    Raises:
        UserError: for a file that is none.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a record of `evaluate`.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is no record of the schema {SCHEMA}: give one that `evaluate` wrote.")
    return record


def print_record(record: dict):
    """Print the numbers of a record, each beside its error, its floor and its N, and what was skipped."""
    rows = [["metric", "value", "+-", "floor (real)", "N", "N real"]]
    for entry in record["metrics"]:
        if entry.get("status") != "skipped":
            rows.append([entry["id"], *(number(entry[key]) for key in ("value", "se", "floor", "n_gen", "n_ref"))])
    print(table(rows))
    for ids, reason in by_reason({entry["id"]: entry.get("reason") for entry in record["metrics"]}):
        print(f"skipped: {ids} ({reason})")


def by_reason(reasons: dict[str, str | None]) -> list[tuple[str, str]]:
    """Return (metrics joined by commas, why they are skipped) for each reason that there is."""
    found = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
    return [(", ".join(id for id, why in reasons.items() if why == reason), reason) for reason in found]


def compare_command(arguments):
    """Run `python -m ddpm_hf compare` with its parsed flags."""
    records = {
        Path(path).stem if len(arguments.records) > 1 else path: read_record(path) for path in arguments.records
    }
    if len(records) < len(arguments.records):
        records = {path: read_record(path) for path in arguments.records}
    print(comparison(records, arguments.vary, arguments.markdown))


def comparison(records: dict[str, dict], vary: list[str] = (), markdown: bool = False) -> str:
    """Return a table: one row a metric, one column a record, by its name; values with their errors.

    Args:
        vary: fields (dotted; `sampler` means all below it) that may differ; they become rows at the top.

    Raises:
        UserError: if anything else of the protocol differs, naming the field and both values.
    """
    flat = {name: flatten(record) for name, record in records.items()}
    protocols = {name: protocol(record) for name, record in records.items()}
    ids = [entry["id"] for record in records.values() for entry in record["metrics"]]
    is_metric = {field: is_below(field, ids) for fields in protocols.values() for field in fields}
    first = next(iter(records))
    for name in vary:
        if not any(is_below(field, [name]) for field in is_metric):
            raise UserError(f"--vary {name} is no field of these records: give sampler, data or a part of them.")
    varied, unlike = [], []
    for field in is_metric:
        values = {name: fields.get(field) for name, fields in protocols.items()}
        other = next((name for name, value in values.items() if value != values[first]), None)
        if other is None or is_metric[field] and None in values.values():
            continue  # a metric that one of them lacks is a gap in the table
        if is_below(field, vary):
            varied.append(field)
        else:
            unlike.append(f"{field} is {values[first]} and {values[other]}")
    if unlike:
        fields = ",".join(field.partition(" is ")[0] for field in unlike)
        raise UserError(
            f"the records are of several protocols ({'; '.join(unlike)}): evaluate alike, or say --vary {fields}."
        )
    # What is told apart though it is no protocol: the models.
    for field in ("model.name", "model.weights", "model.train_step"):
        if len({str(fields.get(field)) for fields in flat.values()}) > 1:
            varied.append(field)
    rows = [["", *records]]
    rows += [[field, *(str(fields.get(field)) for fields in flat.values())] for field in varied]
    entries = {name: {entry["id"]: entry for entry in record["metrics"]} for name, record in records.items()}
    for id in dict.fromkeys(id for of_one in entries.values() for id in of_one):
        rows.append([id, *(cell(of_one.get(id)) for of_one in entries.values())])
        floors = {number(of_one[id].get("floor")) for of_one in entries.values() if id in of_one} - {""}
        if len(floors) == 1:
            rows[-1][0] += f" (floor {floors.pop()})"
    return table(rows, markdown)


def protocol(record: dict) -> dict:
    """Return what two records must have in common, flat: sampler, data, networks, and N of each metric."""
    fields = {key: value for key, value in flatten(record).items() if not is_below(key, NOT_PROTOCOL)}
    for entry in record["metrics"]:
        how = {key: entry.get(key) for key in ("n_gen", "n_ref", "extractor", "se_method")}
        how |= {key: entry.get("extra", {}).get(key) for key in ("mode", "split")}
        fields |= {f"{entry['id']}.{key}": value for key, value in how.items() if value is not None}
    return fields


def flatten(value, name: str = "") -> dict:
    """Return nested dicts as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in flatten(value[part], f"{name}.{part}".lstrip(".")).items()}


def is_below(field: str, names) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def cell(entry: dict | None) -> str:
    if entry is None:
        return "-"
    if entry.get("status") == "skipped":
        return "skipped"
    return number(entry["value"]) + (f" +- {number(entry['se'])}" if entry["se"] is not None else "")


def number(value) -> str:
    """Return a number as a table has it: whole numbers whole, others with four significant digits."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(rows: list[list[str]], markdown: bool = False) -> str:
    """Return rows, the first of which is the head, as aligned text or as Markdown."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def eval_results(record: dict) -> list[EvalResult]:
    """Return the numbers of a record as the Hub's model cards hold them, each with its protocol in `metric_args`."""
    data, sampler = record["data"], record["sampler"]
    results = []
    for entry in record["metrics"]:
        kind = next((kind for start, kind in METRIC_TYPES.items() if re.match(start, entry["id"])), entry["id"])
        if entry.get("status") == "skipped":
            continue
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=data["name"],
                dataset_name=data["name"],
                dataset_split="test" if entry["id"].endswith("_test") or kind == "bits_per_dim" else "train",
                metric_type=kind,
                metric_name=f"{entry['id']}, {sampler.get('method')} in {sampler.get('num_inference_steps')} steps",
                metric_value=entry["value"],
                metric_args=without_none(
                    {
                        "num_samples": entry["n_gen"],
                        "se": entry["se"],
                        "extractor": entry.get("extractor"),
                        "sampler": without_none(sampler),
                    }
                ),
            )
        )
    return results


def without_none(values: dict) -> dict:
    """Return what YAML would keep."""
    return {key: value for key, value in values.items() if value is not None}
