"""The scores of a model card: which records and entries it shows, and how each was measured."""

import re
import shlex
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult

from ..evaluation.inputs import SUITES
from ..evaluation.metrics import METRICS, in_words
from ..evaluation.records import COPYING, NOTHING_KNOWN, is_about_copying, number, table
from ..markdown import code, code_block, literal
from ..models.pretrained import published_hash


def of_these_weights(records: dict[str, dict], folder: Path) -> dict[str, dict]:
    """Return the records that score the weights in the folder.

    A run can also have records of other weights: of earlier steps (--eval_metrics), or of --weights raw.
    """
    published = published_hash(folder)
    return {
        file: record
        for file, record in records.items()
        if published is None or record["model"].get("unet_sha256", published) == published
    }


def best_scores(records: dict[str, dict]) -> list[tuple[str, dict]]:
    """Return one (name of the record, entry) per metric, from the record that used the most images.

    If two records used the same number of images, the better value is taken. Quick checks are left out (see
    `is_quick_check`). Scores compete only if they can be compared: they must have the sampler settings, the data and
    the extractor of the record with the most images (if several: with the most metrics).
    """
    best = {}
    shown = {
        file: [entry for entry in record["metrics"] if is_shown(entry, record)] for file, record in records.items()
    }
    largest = max(records, key=lambda file: size(shown[file]), default=None)
    yardsticks = {metric_of(entry): yardstick(records[largest], entry) for entry in shown.get(largest, [])}
    for file, record in records.items():
        for entry in shown[file]:
            metric, own = metric_of(entry), yardstick(record, entry)
            is_of_table = way_of_scoring(record, entry) == way_of_scoring(records[largest], entry)
            if not is_of_table or own != yardsticks.setdefault(metric, own):
                continue
            if metric not in best or quality(best[metric][1]) < quality(entry):
                best[metric] = file, entry
    return list(best.values())


def size(entries: list[dict]) -> tuple[float, int, float]:
    """Return a sort key for the entries of a record: most generated images, most metrics, most real images."""
    generated = [images_used(entry) for entry in entries if entry["n_gen"] is not None]
    return max(generated, default=0), len(generated), max(map(images_used, entries), default=0)


def metric_of(entry: dict) -> str:
    """Return the id without the number of images: fid2k_full and fid50k_full are the same metric."""
    return re.sub(r"(?<=[a-z_])\d+k?(?=_|$)", "", entry["id"])


def way_of_scoring(record: dict, entry: dict) -> list:
    """Return what all scores in a card's tables share: the data, and for generated images the sampler but its seed."""
    data = {name: value for name, value in record["data"].items() if name != "reference_sha256"}
    return [data, None if entry["n_gen"] is None else record["sampler"] | {"seed": None}]


def yardstick(record: dict, entry: dict) -> list:
    """Return what two values of a metric must share to be compared: the extractor, and for FID the --reference."""
    is_fid = metric_of(entry) == "fid_full"
    return [entry.get("extractor"), record["data"].get("reference_sha256") if is_fid else None]


def quality(entry: dict) -> tuple[float, float]:
    """Return a sort key that is largest for the score to show: first the number of images, then the value."""
    return images_used(entry), -entry["value"] if entry.get("lower_is_better") else entry["value"]


def images_used(entry: dict) -> float:
    """Return how many images a score was measured on: generated ones, or real ones if none were generated."""
    return (entry["n_ref"] if entry["n_gen"] is None else entry["n_gen"]) or 0


def is_shown(entry: dict, record: dict) -> bool:
    """Return whether a card may show an entry of a record: it has a value, and is not a quick check."""
    return entry.get("value") is not None and not is_quick_check(entry, record)


def is_quick_check(entry: dict, record: dict) -> bool:
    """Return whether a score used too few images for a card: no more than the suite "smoke".

    A bits_per_dim of all held-out images is not a quick check, even if they are few.
    """
    smoke, held_out = SUITES["smoke"], (record["data"].get("held_out") or {}).get("n")
    if entry["n_gen"] is not None:
        return entry["n_gen"] <= smoke["num_images"]
    return images_used(entry) <= smoke["bound_images"] and entry["n_ref"] != held_out


def is_headline(id: str) -> bool:
    """Return False for scores that a card's metadata leaves out: those about copying, classes, density or coverage."""
    return not is_about_copying(id) and not id.startswith(("class_", "density", "coverage"))


def eval_result(record: dict, entry: dict) -> EvalResult:
    """Return a score in the format of the Hub's cards. `metric_args` says how it was measured."""
    data, sampler, kind = record["data"], record["sampler"], hub_name(entry["id"])
    keys = {"sampler": "method", "num_inference_steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    protocol = {"num_samples": entry["n_gen"]} | {ours: sampler.get(key) for ours, key in keys.items()}
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=data["name"],
        dataset_name=data["name"],
        dataset_split="test" if "_test" in entry["id"] or is_on_held_out(entry) else "train",
        metric_type=kind,
        metric_name=entry["id"],
        metric_value=entry["value"],
        metric_args=without_none(protocol if entry["n_gen"] is not None else {"num_images": entry["n_ref"]}) or None,
    )


def is_on_held_out(entry: dict) -> bool:
    """Return whether bits/dim was measured on held-out images. If there are none, training images are used."""
    return hub_name(entry["id"]) == "bits_per_dim" and entry.get("extra", {}).get("split") != "train"


def hub_name(id: str) -> str:
    """Return the Hub's name for the metric with this id, or the id itself if the Hub has no name for it."""
    known = {start: name for metric in METRICS.values() for start, name in metric.hub_names.items()}
    return next((name for start, name in known.items() if re.match(rf"{start}\d", id)), id)


def without_none(values: dict) -> dict:
    """Return a copy of a dict without the entries whose value is None. YAML would not keep them."""
    return {key: value for key, value in values.items() if value is not None}


def no_scores(records: dict[str, dict], name: str) -> str:
    """Return Markdown that says why no scores are shown, and how to get some."""
    entries = [entry for record in records.values() for entry in record["metrics"]]
    command = code(f"python -m ddpm_hf evaluate {shlex.quote(name)}")
    scored = f"{SUITES['fast']['num_images']:,} images"
    if all(entry.get("value") is None for entry in entries):
        return f"Not scored yet: {command} scores {scored}, and adds the scores here."
    return (
        "Only a quick check was made (`--suite smoke`), and it used too few images for its scores to be shown. "
        f"{command} uses enough: {scored}."
    )


def scores(records: dict[str, dict], chosen: list[tuple[str, dict]], name: str) -> str:
    """Return Markdown with tables of the chosen scores, and how each of their records was measured.

    The scores about copying have their own table, because for them neither lower nor higher values are better.
    """
    if not chosen:
        return no_scores(records, name)
    files = list(dict.fromkeys(file for file, _ in chosen))
    quality = [["score", "", "value", "real images", "images", "measured"]]
    copying = [["about copying", *quality[0][2:]]]
    for file, entry in chosen:
        words = in_words(entry["id"])
        if words and entry.get("extra", {}).get("split") == "train":
            words += ", on training images"
        direction = {True: "↓ lower is better", False: "↑ higher is better"}.get(entry.get("lower_is_better"), "")
        is_copying = is_about_copying(entry["id"])
        (copying if is_copying else quality).append(
            [
                f"{words} ({code(entry['id'])})" if words else code(entry["id"]),
                *([] if is_copying else [direction]),
                with_error(entry),
                number(entry["floor"]),
                number(images_used(entry)),
                f"[{files.index(file) + 1}](evaluations/{quote(file)})",
            ]
        )
    what = (
        "“images” is how many images were scored. “real images” is the score of as many held-out real images, or of "
        "all if there are fewer. A good model comes close to it. “measured” links to the record, which has every "
        "detail:"
    )
    if any(entry["id"] == "bits_per_dim" for _, entry in chosen):
        what = f"{NOTHING_KNOWN} {what}"
    tables = [table(quality, markdown=True)] if len(quality) > 1 else []
    tables += [COPYING, table(copying, markdown=True)] if len(copying) > 1 else []
    ways = [f"{k}. {measured(records[file])}" for k, file in enumerate(files, 1)]
    commands = "\n".join(records[file]["command"] for file in files if records[file].get("command"))
    details = f"<details><summary>Commands</summary>\n\n{code_block('bash', commands)}\n\n</details>"
    others = other_ways(records, chosen)
    return "\n\n".join([*tables, what, "\n".join(ways), *others, *([details] if commands else [])])


def with_error(entry: dict) -> str:
    """Return the value of a score and its standard error, if it has one."""
    return number(entry["value"]) + ("" if entry["se"] is None else f" ± {number(entry['se'])}")


def other_ways(records: dict[str, dict], chosen: list[tuple[str, dict]]) -> list[str]:
    """Return Markdown with the main scores of records whose sampler settings or data are not in the tables."""
    shown = [way_of_scoring(records[file], entry) for file, entry in chosen]
    lines = []
    for file, record in records.items():
        entries = [
            f"{in_words(entry['id']) or code(entry['id'])} {with_error(entry)}"
            for entry in record["metrics"]
            if is_shown(entry, record) and way_of_scoring(record, entry) not in shown
            if "_test" not in entry["id"] and (is_headline(entry["id"]) or entry["id"] == "class_accuracy")
        ]
        if entries:
            way = ", ".join([*way_in_words(record), data_in_words(record)])
            lines.append(f"- [{way}](evaluations/{quote(file)}): {'; '.join(entries)}.")
    return ["The same weights, drawn in other ways or compared with other data:", "\n".join(lines)] if lines else []


def measured(record: dict) -> str:
    """Return a sentence in Markdown that says how the scores of a record were measured."""
    cost = record["cost"]
    how = way_in_words(record)
    how += [f"weights: {literal(record['model']['weights'])}"] if "weights" in record["model"] else []
    spent = f"drawn in {number(cost.get('drawing_s'))} s, scored in {number(cost.get('scoring_s'))} s"
    sentence = f"{', '.join(how)}; {data_in_words(record)}; {spent}."
    return f"{sentence[0].upper()}{sentence[1:]}"


def data_in_words(record: dict) -> str:
    """Return a phrase in Markdown that says with which images the scores of a record compare."""
    data = record["data"]
    words = f"against {code(data['name'])} ({number(data['train'].get('n'))} training images"
    words += f", {number(data['held_out'].get('n'))} held out)" if data.get("held_out") else ")"
    if "reference_sha256" in data:
        words += f", FID against the statistics of a file (SHA-256 {literal(str(data['reference_sha256'])[:8])})"
    return words


def way_in_words(record: dict) -> list[str]:
    """Return phrases in Markdown that say how the images of a record were drawn."""
    sampler = record["sampler"]
    steps = literal(sampler.get("num_inference_steps"))
    how = [f"{literal(sampler['method'].upper())} in {steps} steps"] if "method" in sampler else []
    how += [literal(sampler["dtype"])] if sampler.get("dtype", "float32") != "float32" else []
    how += [f"{key} {literal(sampler[key])}" for key in ("eta", "seed", "guidance_scale") if key in sampler]
    is_unguided = sampler.get("class_labels") is not None and "guidance_scale" not in sampler
    return [*how, "no guidance"] if is_unguided else how
