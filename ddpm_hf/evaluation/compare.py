"""Show records side by side in a table, if they were measured in the same way."""

import math
import re
from itertools import combinations
from pathlib import Path

from ..errors import UserError, suggestion
from ..markdown import literal
from .records import is_about_copying, number, read_record, table


# Two records can be compared even if these fields differ: the model, the environment and the numbers. The list has
# "extractors", because the entry of each metric names its extractor anyway.
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
BEYOND = 2  # standard errors; by chance alone, one difference in twenty is larger
LEGEND = (
    "+-: standard error. floor: the value of real images. better: whether lower or higher values are better.\n"
    f"best: the record that is better than every other one by more than {BEYOND} standard errors of their difference."
)
SHOWN = 4  # an error message names at most this many differences


def compare(*records, vary: list[str] = (), markdown: bool = False) -> str:
    """Return a table of the scores of several records. It shows standard errors, and which record is best.

    Args:
        records: paths of records that `evaluate` wrote, or results of `evaluate`. Each becomes a column.
        vary: settings that may differ between the records, e.g. `["sampler"]` or `["sampler.eta", "data"]`.
        markdown: return the table as Markdown instead of aligned text.

    Raises:
        UserError: if there is no record, or one is given twice or cannot be read, or if the records were measured in
            different ways. The message names the settings that differ.

    Example:
        >>> settings = dict(metrics=["bits_per_dim"], suite="smoke", bound_images=2, overwrite=True)
        >>> a = ddpm_hf.evaluate("runs/digits", output="published.json", **settings)
        Data: 1,797 images; ...
        >>> b = ddpm_hf.evaluate("runs/digits", output="raw.json", weights="raw", **settings)
        Data: 1,797 images; ...
        >>> table = ddpm_hf.compare(a, b)
        >>> table.splitlines()[0].split()
        ['published', 'raw', 'better', 'best']
    """
    paths = [Path(getattr(record, "path", record)) for record in records]  # of an `Evaluated`, or the path itself
    if not paths:
        raise UserError("there is nothing to compare: give records that `evaluate` wrote.")
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is given {paths.count(twice[0])} times: give each record once.")
    headings = [path.stem for path in paths]
    if len(set(headings)) < len(paths):
        headings = [str(path) for path in paths]
    return comparison(dict(zip(headings, map(read_record, paths))), vary, markdown)


def comparison(records: dict[str, dict], vary: list[str] = (), markdown: bool = False) -> str:
    """Return a table of values with their errors. It has a row for each metric and a column for each record.

    Two more columns say whether lower or higher is better, and which record is best (see `best`). Below the table are
    warnings about records that share images (see `shared_images`).

    Args:
        records: a dict from the heading of a column to its record.
        vary: dotted names of fields that may differ, e.g. `sampler.eta`. `sampler` stands for all fields below it, and
            `n_gen` for the field n_gen of every metric. The fields that differ become rows at the top.
        markdown: return Markdown instead of aligned text.

    Raises:
        UserError: if a field of `protocol` that is not in `vary` differs. The message names the field and both values.
    """
    records = {name: with_guidance(record) for name, record in records.items()}
    flat = {name: flatten(record) for name, record in records.items()}
    protocols = {name: protocol(record) for name, record in records.items()}
    ids = [entry["id"] for record in records.values() for entry in record["metrics"]]
    is_metric = {field: is_below(field, ids) for fields in protocols.values() for field in fields}
    first = next(iter(records))
    check_vary(vary, [*is_metric, *map(group_of, is_metric), *(field for fields in flat.values() for field in fields)])
    varied = []
    unlike = {}
    for field in is_metric:
        values = {name: fields.get(field) for name, fields in protocols.items()}
        other = next((name for name, value in values.items() if value != values[first]), None)
        if other is None or is_metric[field] and None in values.values():
            continue  # a metric that a record lacks becomes a gap in the table
        if is_below(field, vary) or group_of(field) in vary:
            varied.append(field)
        else:
            said = ["not recorded" if values[name] is None else values[name] for name in (first, other)]
            unlike[field] = f"{field} is {said[0]} and {said[1]}"
    if unlike:
        raise UserError(describe_unlike(unlike))
    # Also show the fields in which the models differ, and the fields in `vary`. They are not part of the protocol, so
    # they may differ.
    shown = {name: flat[name] | protocols[name] for name in records}
    more = [field for fields in flat.values() for field in fields if is_below(field, vary)]
    for field in dict.fromkeys(["model.name", "model.weights", "model.train_step", *more]):
        if field not in varied and len({str(fields.get(field)) for fields in shown.values()}) > 1:
            varied.append(field)
    show = literal if markdown else str  # escape names, which come from files and other programs
    rows = [["", *map(show, records), "better", "best"]]
    values = {field: [short(fields.get(field)) for fields in shown.values()] for field in varied}
    rows += [[show(field), *map(show, values[field]), "", ""] for field in varied]
    entries = {name: {entry["id"]: entry for entry in record["metrics"]} for name, record in records.items()}
    for id in dict.fromkeys(ids):
        of_id = {name: by_id[id] for name, by_id in entries.items() if id in by_id}
        rows.append([show(id), *(cell(of_id.get(name)) for name in records), direction(of_id), show(best(of_id))])
        floors = {number(entry.get("floor")) for entry in of_id.values()} - {""}
        if len(floors) == 1:
            rows[-1][0] += f" (floor {floors.pop()})"
    return "\n\n".join([table(rows, markdown), LEGEND, *shared_images(records)])


def direction(entries: dict[str, dict]) -> str:
    """Return which values of a score are better: "lower" or "higher".

    Return "" if the entries give no direction or different ones, and for scores about copying.

    Args:
        entries: a dict from the heading of a record to its entry of the score.
    """
    said = {entry.get("lower_is_better") for entry in measured(entries).values() if not is_about_copying(entry["id"])}
    return {True: "lower", False: "higher"}.get(said.pop(), "") if len(said) == 1 else ""


def measured(entries: dict[str, dict]) -> dict[str, dict]:
    """Return the entries that have a value. Skipped metrics have none."""
    return {name: entry for name, entry in entries.items() if entry.get("value") is not None}


def best(entries: dict[str, dict]) -> str:
    """Return the heading of the record whose score is clearly better than the scores of all other records.

    The standard errors a and b of two scores are taken as independent, so the error of the difference is
    sqrt(a^2 + b^2). Records with the same seed share a part of their errors, and the true error is smaller.

    Args:
        entries: a dict from the heading of a record to its entry of the score.

    Returns:
        The heading. "not clear" if the best score differs from another score by at most BEYOND errors. "" if there are
        fewer than two scores, if a score has no error, or if `direction` returns "".
    """
    better = direction(entries)
    entries = measured(entries)
    if not better or len(entries) < 2 or any(entry["se"] is None for entry in entries.values()):
        return ""
    sign = 1 if better == "lower" else -1
    first, *others = sorted(entries, key=lambda name: sign * entries[name]["value"])
    one = entries[first]
    is_clear = all(
        abs(one["value"] - entries[name]["value"]) > BEYOND * math.hypot(one["se"], entries[name]["se"])
        for name in others
    )
    return first if is_clear else "not clear"


def describe_unlike(unlike: dict[str, str]) -> str:
    """Return the error message for records that were measured in different ways. It names up to SHOWN fields.

    Args:
        unlike: for each field that differs, a phrase with both values.
    """
    # Name the data first, because most other differences follow from it.
    fields = sorted(unlike, key=lambda field: (field != "data.name", not is_below(field, ["sampler"])))
    phrases, vary = [unlike[field] for field in fields], list(unlike)
    if len(fields) > SHOWN:
        phrases = [*phrases[:SHOWN], f"and {len(fields) - SHOWN} more"]
        vary = dict.fromkeys(group_of(field) for field in fields)
    return (
        f"the records were measured in different ways ({'; '.join(phrases)}): evaluate all of them in the same way, "
        f"or add --vary {','.join(vary)}."
    )


def group_of(field: str) -> str:
    """Return the short name for a field in `vary`: "sampler", "data", or the last part of the dotted field."""
    start, _, rest = field.partition(".")
    return start if start in ("sampler", "data") else rest.rpartition(".")[2] or start


def check_vary(vary: list[str], fields: list[str]):
    """Raise a UserError for a name in `vary` that is not one of the dotted `fields` or the beginning of one.

    The beginning of `sampler.eta` is `sampler`.
    """
    parts = [field.split(".") for field in fields]
    known = dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1))
    for name in vary:
        if name not in known:
            close = suggestion(name, known, "give sampler, data, or one of their fields, e.g. sampler.eta.")
            raise UserError(f"--vary {name} is not a field of these records: {close}")


def shared_images(records: dict[str, dict]) -> list[str]:
    """Return a warning for each pair of records of one model that share some noise, because their seeds are close.

    Image k is drawn from seed + k, so N images of seed s and N of seed s + 1 share all images but one.
    """
    warnings = []
    for (name, one), (other_name, other) in combinations(records.items(), 2):
        samplers = [record["sampler"] | {"seed": None} for record in (one, other)]
        weights = [record["model"].get("unet_sha256") for record in (one, other)]
        seeds = [record["sampler"].get("seed") for record in (one, other)]
        counts = [record.get("samples", {}).get("n", 0) for record in (one, other)]
        if None in seeds + weights or weights[0] != weights[1] or samplers[0] != samplers[1] or seeds[0] == seeds[1]:
            continue
        shared = min(seed + count for seed, count in zip(seeds, counts)) - max(seeds)
        if shared > 0:
            warnings.append(
                f"Warning: {name} and {other_name} draw {shared:,} of their images from the same noise, because their "
                f"seeds are {seeds[0]} and {seeds[1]}: for independent images, give seeds that are at least "
                f"{max(counts)} apart."
            )
    return warnings


def with_guidance(record: dict) -> dict:
    """Return the record. If it draws classes and states no guidance scale, add the scale 1."""
    sampler = record["sampler"]
    has_classes = sampler.get("class_labels") is not None
    return record | {"sampler": {"guidance_scale": 1.0} | sampler} if has_classes else record


def protocol(record: dict) -> dict:
    """Return the fields that must be equal in comparable records, as a dict with dotted names.

    The fields describe the sampler, the data, and how each metric was computed.
    """
    fields = {key: value for key, value in flatten(record).items() if not is_below(key, NOT_PROTOCOL)}
    for entry in record["metrics"]:
        how = {key: entry.get(key) for key in ("n_gen", "n_ref", "extractor", "se_method", "code")}
        how |= {key: entry.get("extra", {}).get(key) for key in ("mode", "split")}
        fields |= {f"{entry['id']}.{key}": value for key, value in how.items() if value is not None}
    return fields


def flatten(value, name: str = "") -> dict:
    """Return nested dicts as one dict with dotted names, e.g. {"sampler.eta": 0.0}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in flatten(value[part], f"{name}.{part}".lstrip(".")).items()}


def is_below(field: str, names) -> bool:
    """Return whether a dotted field is one of `names`, or is below one of them: sampler.eta is below sampler."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def short(value) -> str:
    """Return the value of a field for a cell of the table: "-" for None, and the first twelve digits of a hash."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value)
    return "-" if value is None else value[:12] if is_hash else str(value)


def cell(entry: dict | None) -> str:
    """Return the text of one cell of the table: the value and its error, "skipped", or "-" if there is no entry."""
    if entry is None:
        return "-"
    if entry.get("status") == "skipped":
        return "skipped"
    return number(entry["value"]) + (f" +- {number(entry['se'])}" if entry["se"] is not None else "")
