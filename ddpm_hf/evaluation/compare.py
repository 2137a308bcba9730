"""Records side by side, where their protocols are the same."""

from ..errors import UserError
from .records import number, table


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
