"""Write README.md, the model card of a run or an export. It is made only from the files in the folder.

Every number in the card is read from a record: train_config.json, metrics.jsonl or evaluations/*.json. If something
was not measured, the card says so.
"""

import dataclasses
import logging
import os
import re
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCardData

from ..config.presets import BUILT_IN, PRESETS
from ..config.run_record import read_run
from ..config.training_config import GROUPS, EvaluationOptions, HubOptions, OutputOptions
from ..errors import UserError
from ..evaluation.records import data_name, number, read_record, table
from ..files import read_json, write_beside, writing
from ..markdown import code, code_block, literal
from ..models import judge
from ..provenance import without_paths
from ..run_folder import files_in, read_metrics
from .card_scores import best_scores, eval_result, is_headline, of_these_weights, scores
from .card_usage import classifier_usage, path_here, usage
from .hub import is_hub_id
from .licences import licence_of
from .published import is_ours


logger = logging.getLogger(__name__)
# Marks a card that ddpm_hf wrote, and contains the repository's name, URL-quoted. Earlier versions did not quote it.
MARKER = re.compile(r"^<!-- ddpm_hf: (.+?) -->$", re.MULTILINE | re.DOTALL)
CITATION = "## Citation\n\n" + code_block(
    "bibtex",
    """@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
  url = {https://arxiv.org/abs/2006.11239}
}""",
)
MEASURES = {
    "parameters": "Parameters",
    "num_images": "Training images",
    "step": "Optimizer steps",
    "images_seen": "Images seen",
    "seconds": "Seconds of training",
    "images_per_second": "Last images per second",
    "num_processes": "Processes",
    "device": "Device",
    "processor": "Processor",
    "loss": "Last training loss",
    "validation_loss": "Last validation loss",
    "validation_loss_ema": "Last validation loss, averaged weights",
    "validation_accuracy": "Last validation accuracy, over all noise levels",
    "git_commit": "Commit of ddpm_hf",
}


def check_has_model(folder: Path):
    """Raise UserError if a folder is neither a run nor an export."""
    if not (folder / "model_index.json").is_file() and not (folder / "classifier").is_dir():
        raise UserError(f"{folder} has no model: give the --output_dir of a run, or the folder of an export.")


def write_card(folder: str | Path, name: str | None = None, place: str | Path | None = None) -> bool:
    """Write README.md, the model card of a run or an export, and return True.

    Keep a README.md that is a link or that ddpm_hf did not write, and return False.

    Args:
        folder: a folder with a pipeline or a classifier. The card also shows the records and pictures of a run, the
            scores in evaluations/, and how to call the pipeline files in the folder.
        name: the repository's name, e.g. "me/ddpm-cifar10". None: the first of these names that is known: the
            repository of the last push, the run's --hub_model_id, the folder's name.
        place: the path in the card's example code, if the model has no repository. None: the path of `folder`.

    Raises:
        UserError: if a file of the folder cannot be read, or README.md cannot be written.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    with writing("the model card", readme):
        is_file = readme.is_file() and not readme.is_symlink()
        before = MARKER.search(readme.read_text(encoding="utf-8", errors="replace")) if is_file else None
        if before is None and os.path.lexists(readme):
            return False
        pushed_to = before[1] if before is not None and "/" in before[1] else None
        text = checked_text(folder, name, pushed_to=pushed_to, place=None if place is None else Path(place))
        # The name of a folder need not be UTF-8.
        write_beside(readme, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))
    return True


def write_card_or_warn(folder: str | Path, name: str | None = None):
    """Call `write_card`. If it fails, log a warning, so that the caller can go on without a card."""
    try:
        write_card(folder, name)
    except UserError as error:
        logger.warning("%s has no up-to-date model card: %s", folder, error)


def checked_text(folder: Path, name: str | None = None, **options) -> str:
    """Return the text of the card of a folder. The arguments are those of `card_text`.

    Raises:
        UserError: if a file of the folder cannot be read, or has unexpected content.
    """
    try:
        return card_text(folder, name, **options)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # JSON from elsewhere may hold anything
        raise UserError(
            f"the model card of {folder} cannot be made, because one of its JSON files has unexpected content "
            f"({type(error).__name__}: {error}): give a folder that ddpm_hf wrote."
        ) from error


def card_text(folder: Path, name: str | None, *, pushed_to: str | None = None, place: Path | None = None) -> str:
    """Return the text of the card of a folder; see `write_card`."""
    index = read_json(folder / "model_index.json", missing={})
    try:
        judge.check_index(index)
    except ValueError as error:
        raise UserError(f"the card of {folder} cannot be written ({error}): repair its model_index.json.") from error
    run = without_paths(read_run(folder))
    flags = run.get("flags", {})
    dataset_name = flags.get("dataset_name")
    if dataset_name == "digits" and read_run(folder)["flags"]["dataset_name"] != "digits":
        dataset_name = None  # somebody's own folder of this name
    name = name or pushed_to or flags.get("hub_model_id") or folder.resolve().name
    records = {path.name: read_record(path) for path in files_in(folder, ["evaluations/*.json"]) if is_ours(path)}
    fitting = of_these_weights(records, folder)
    data = flags.get("dataset_name") or flags.get("train_data_dir")
    on_hub = dataset_name is not None and is_hub_id(dataset_name)
    base = run.get("base_model") or {}
    licence, about_data = licence_of(dataset_name, base)
    on_hub_before = base.get("revision") is not None and is_hub_id(str(base.get("name")))
    is_classifier = flags.get("objective") == "classify"
    task = "image-classification" if is_classifier else "unconditional-image-generation"
    chosen = best_scores(fitting)
    results = [eval_result(records[file], entry) for file, entry in chosen if is_headline(entry["id"])]
    metadata = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", "ddpm", task, "pytorch", "ddpm_hf"],
        datasets=[data] if on_hub else None,
        base_model=base.get("name") if on_hub_before else None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    where = name if "/" in name else path_here(place or folder)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"<!-- ddpm_hf: {quote(name, errors='replace')} -->\n# {literal(name.rpartition('/')[2])}",
        introduction(folder, flags, data, dataset_name, base),
        *pictures(folder),
        "## Use\n\n" + "\n\n".join(classifier_usage(where) if is_classifier else usage(where, folder)),
        "## Scores\n\n" + scores(fitting, chosen, where),
        *training(folder, run, flags),
        "## Limits\n\n" + limits(flags, data, [entry for _, entry in chosen], is_started=bool(base)),
        data_and_licence(about_data, licence) if data else "",
        CITATION,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def introduction(folder: Path, flags: dict, data: str | None, dataset_name: str | None, base: dict) -> str:
    """Return the introduction of the card: what the model is, its data, the model it started from, its classes.

    Args:
        data: the value of --dataset_name or --train_data_dir. None if neither is known.
        dataset_name: the value of --dataset_name. None if the images are the user's own.
        base: the "base_model" of train_config.json. {} if the training began without --init_from.
    """
    unet = read_json(folder / "unet" / "config.json", missing={}) or read_json(
        folder / "classifier" / "config.json", missing={}
    )
    classes = read_json(folder / "model_index.json", missing={}).get("id2label") or {}
    kind = "A denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239))"
    if flags.get("objective") == "classify":
        kind = "A classifier of noisy images, to guide a DDPM of the same data and schedule,"
    elif unet.get("num_class_embeds") is not None:
        kind = "A class-conditional denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239))"
    if dataset_name is not None and is_hub_id(dataset_name):
        data = f"[{data}](https://huggingface.co/datasets/{data})"
    elif data is not None:
        data = "scikit-learn's handwritten digits" if dataset_name == "digits" else code(data_name(data))
    named = [literal(classes[k]) for k in sorted(classes, key=int)]
    of_classes = f" Its classes: {', '.join(named[:20])}{' and more' * (len(named) > 20)}." if named else ""
    size = unet.get("sample_size")
    height, width = map(literal, size if isinstance(size, list) and len(size) == 2 else [size, size])
    channels = unet.get("in_channels")
    images = "images" if channels in (1, 3) else f"images with {literal(channels)} channels"
    of_data = f"trained on {data} " if data else ""
    start = f" Its training began with the weights of {code(str(base['name']))}." if base.get("name") else ""
    return f"{kind} of {height}x{width} {images}, {of_data}with `ddpm_hf`.{start}{of_classes}"


def pictures(folder: Path) -> list[str]:
    """Return Markdown for a sheet of samples, and for the animation from noise to images, if they exist.

    The sheet is the one with guidance. If there is none, the last sheet of the training is shown.
    """
    sheets = sorted(files_in(folder, ["samples/epoch_#.png"]), key=lambda sheet: (len(sheet.name), sheet.name))
    epochs = {f"Samples after epoch {int(sheet.stem.partition('_')[2])}, not selected": sheet for sheet in sheets[-1:]}
    guided = "Samples with guidance, one row for each class, not selected"
    shown = {guided: folder / "figures" / "guided.png"} if files_in(folder, ["figures/guided.png"]) else epochs
    if files_in(folder, ["figures/reverse.gif"]):
        shown["Samples on the way from noise to images"] = folder / "figures" / "reverse.gif"
    return [f"![{what}]({path.relative_to(folder).as_posix()})\n\n*{what}*" for what, path in shown.items()]


def training(folder: Path, run: dict, flags: dict) -> list[str]:
    """Return the paragraphs about the training, in Markdown: command, cost, loss curve, recipe and flags."""
    if not run:
        return []
    last = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        last |= {key: value for key, value in line.items() if value is not None}
    known = {what: (run | last).get(key) for key, what in MEASURES.items()}
    rows = [
        [what, literal(value) if isinstance(value, str) else number(value)]
        for what, value in known.items()
        if value and isinstance(value, (str, int, float))
    ]
    preset = PRESETS.get(flags.get("preset"))
    recipe = f"The recipe is the preset `{flags['preset']}`: {preset.about}." if preset else ""
    if preset is not None and preset is BUILT_IN.get(flags["preset"]):
        recipe += " The sources of its numbers are in `ddpm_hf/config/presets.py`."
    groups = [group for group in GROUPS if group not in (OutputOptions, EvaluationOptions, HubOptions)]
    fields = [field for group in groups for field in dataclasses.fields(group) if field.name in flags]
    # Show 0, False and an empty list only where the default is another value.
    shown = [
        [f"`{field.name}`", literal(flags[field.name])]
        for field in fields
        if field.name != "local_rank" and (flags[field.name] or flags[field.name] != field.default)
    ]
    curve = ["![Loss](figures/loss.png)"] if files_in(folder, ["figures/loss.png"]) else []
    logged = ", every logged step in [metrics.jsonl](metrics.jsonl)" if files_in(folder, ["metrics.jsonl"]) else ""
    return [
        "## Training\n\n" + code_block("bash", run["command"]) if run.get("command") else "## Training",
        table([["", "value"], *rows], markdown=True),
        *curve,
        f"{recipe} Every flag is in [train_config.json](train_config.json){logged}.".lstrip(),
        f"<details><summary>Flags</summary>\n\n{table([['flag', 'value'], *shown], markdown=True)}\n\n</details>",
    ]


def limits(flags: dict, data: str | None, entries: list[dict], *, is_started: bool) -> str:
    """Return sentences on what the model cannot do, and on what was not measured.

    Args:
        is_started: whether the training started from the weights of another model.
    """
    sentences = []
    if data:
        how = "last trained on" if is_started else "trained on"
        sentences.append(f"The model was {how} {code(data_name(data))} and does not suit other images.")
    copies = next((entry for entry in entries if entry["id"] == "memorization_exact_copies"), None)
    if copies is None or copies["value"] is None:
        sentences.append("Whether the model copies training images was not measured.")
    else:
        count = number(copies["n_gen"])
        sentences.append(
            f"Of {count} generated images, {number(copies['value'])} are exact copies of training images."
        )
    if entries:
        sentences.append("Compare the scores only with scores of the same N, reference, sampler and extractor.")
    if flags.get("variance_type") == "learned_range":
        sentences.append(
            "Samplers that expect the UNet to predict only noise cannot use this model: it also predicts a variance."
        )
    return " ".join(sentences)


def data_and_licence(about_data: str, licence: str | None) -> str:
    """Return the paragraph about the origin of the data and the licence of the model."""
    model = f" The licence of the model: `{licence}`." if licence else ""
    return f"## Data and licence\n\nThe images: {about_data}{model}"
