"""Put records side by side if they were measured in the same way."""

from ..errors import UserError
from .records import number, table


# These fields may differ between two records that are compared: the model, the environment and the numbers. The
# extractors are among them because each entry of a metric names its own.
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


def comparison(records: dict[str, dict], vary: list[str] = (), markdown: bool = False) -> str:
    """Return a table of values with their errors: a row for each metric, a column for each record.

    Args:
        records: by the name that heads the column.
        vary: dotted fields that may differ; `sampler` stands for all of its fields. They become rows at the top.
        markdown: return Markdown instead of aligned text.

    Raises:
        UserError: if any other field of the protocol differs, with the field and both values.
    """
    flat = {name: flatten(record) for name, record in records.items()}
    protocols = {name: protocol(record) for name, record in records.items()}
    ids = [entry["id"] for record in records.values() for entry in record["metrics"]]
    is_metric = {field: is_below(field, ids) for fields in protocols.values() for field in fields}
    first = next(iter(records))
    for name in vary:
        if not any(is_below(field, [name]) for field in is_metric):
            raise UserError(f"--vary {name} is not a field of these records: give sampler, data or a field of them.")
    varied = []
    unlike = []
    for field in is_metric:
        values = {name: fields.get(field) for name, fields in protocols.items()}
        other = next((name for name, value in values.items() if value != values[first]), None)
        if other is None or is_metric[field] and None in values.values():
            continue  # a metric that a record lacks becomes a gap in the table
        if is_below(field, vary):
            varied.append(field)
        else:
            unlike.append(f"{field} is {values[first]} and {values[other]}")
    if unlike:
        fields = ",".join(field.partition(" is ")[0] for field in unlike)
        raise UserError(
            f"the records were measured in different ways ({'; '.join(unlike)}): evaluate them alike, or add "
            f"--vary {fields}."
        )
    # Show how the models differ, which is not part of the protocol.
    for field in ("model.name", "model.weights", "model.train_step"):
        if len({str(fields.get(field)) for fields in flat.values()}) > 1:
            varied.append(field)
    rows = [["", *records]]
    rows += [[field, *(str(fields.get(field)) for fields in flat.values())] for field in varied]
    entries = {name: {entry["id"]: entry for entry in record["metrics"]} for name, record in records.items()}
    for id in dict.fromkeys(ids):
        rows.append([id, *(cell(by_id.get(id)) for by_id in entries.values())])
        floors = {number(by_id[id].get("floor")) for by_id in entries.values() if id in by_id} - {""}
        if len(floors) == 1:
            rows[-1][0] += f" (floor {floors.pop()})"
    return table(rows, markdown)


def protocol(record: dict) -> dict:
    """Return what comparable records share, by dotted name: sampler, data, and each metric's network and N."""
    fields = {key: value for key, value in flatten(record).items() if not is_below(key, NOT_PROTOCOL)}
    for entry in record["metrics"]:
        how = {key: entry.get(key) for key in ("n_gen", "n_ref", "extractor", "se_method")}
        how |= {key: entry.get("extra", {}).get(key) for key in ("mode", "split")}
        fields |= {f"{entry['id']}.{key}": value for key, value in how.items() if value is not None}
    return fields


def flatten(value, name: str = "") -> dict:
    """Return nested dicts as one dict with dotted names, e.g. {"sampler.eta": 0.0}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in flatten(value[part], f"{name}.{part}".lstrip(".")).items()}


def is_below(field: str, names) -> bool:
    """Return whether a dotted field is one of `names` or a part of one."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def cell(entry: dict | None) -> str:
    """Return the text of a table's cell: value and error, "skipped", or "-" without an entry."""
    if entry is None:
        return "-"
    if entry.get("status") == "skipped":
        return "skipped"
    return number(entry["value"]) + (f" +- {number(entry['se'])}" if entry["se"] is not None else "")
