"""Write README.md, the model card of a run or an export. It is made only from the files in the folder.

Every number in the card is read from a record: train_config.json, metrics.jsonl or evaluations/*.json. If something
was not measured, the card says so.
"""

import dataclasses
import json
import logging
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from ..config.presets import PRESETS
from ..config.run_record import read_run
from ..config.training_config import GROUPS, EvaluationOptions, HubOptions, OutputOptions
from ..errors import UserError
from ..evaluation.inputs import SUITES
from ..evaluation.metrics import METRICS, in_words
from ..evaluation.records import COPYING, NOTHING_KNOWN, data_name, is_about_copying, number, read_record, table
from ..files import read_json, write_beside, writing
from ..markdown import code, code_block, literal
from ..models import judge
from ..models.classes import Classes
from ..models.pretrained import published_hash
from ..provenance import without_paths
from ..run_folder import files_in, read_metrics
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
# For each pipeline file: what it does, and the arguments of an example call.
PIPELINES = {
    "class_guided": ("Generate images of a class, with guidance", "class_labels=[0], guidance_scale=2.0"),
    "restoration": ("Restore noisy, masked, small, grey or blurred images", 'Image.open("noisy.png"), task="denoise"'),
    "reconstruction": ("Turn an image into noise and back, or blend two images", 'Image.open("image.png")'),
}
# class_guided.py was once two files. Folders from that time hold one of the two, and their cards still describe it.
EARLIER_PIPELINES = dict.fromkeys(["class_conditional", "classifier_guided"], PIPELINES["class_guided"])
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

    If README.md exists and was not written by ddpm_hf, or is a link, keep it and return False.

    Args:
        folder: a folder with a pipeline or a classifier. The card also shows the records and pictures of a run, the
            scores in evaluations/, and how to call the pipeline files in the folder.
        name: the repository's name, e.g. "me/ddpm-cifar10". None: the repository to which the folder was last pushed,
            else the run's --hub_model_id, else the folder's name.
        place: the path from which the card loads a model without a repository. None: the path of `folder`.

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
    """Write the card as `write_card` does. If that fails, log a warning, because a card must not end other work."""
    try:
        write_card(folder, name)
    except UserError as error:
        logger.warning("%s has no up-to-date model card: %s", folder, error)


def checked_text(folder: Path, name: str | None = None, **options) -> str:
    """Return the text of the card of a folder. Its arguments are those of `card_text`.

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


def of_these_weights(records: dict[str, dict], folder: Path) -> dict[str, dict]:
    """Return the records whose scores are of the weights in the folder.

    A run also has records of earlier steps (--eval_metrics), and perhaps of --weights raw.
    """
    published = published_hash(folder)
    return {
        file: record
        for file, record in records.items()
        if published is None or record["model"].get("unet_sha256", published) == published
    }


def best_scores(records: dict[str, dict]) -> list[tuple[str, dict]]:
    """Return (name of the record, entry) for each metric once, from the record that used the most images.

    Of two records with as many images, the better value is taken.
    Entries of quick checks are left out: they have no more images than the suite "smoke".
    All scores of generated images are from one way of drawing: that of the record with the most images and metrics.
    The best score of each way would describe no images at all.
    """
    best = {}
    shown = {
        file: [e for e in record["metrics"] if e.get("value") is not None and not is_quick_check(e, record)]
        for file, record in records.items()
    }
    generated = {file: [images_used(e) for e in entries if e["n_gen"] is not None] for file, entries in shown.items()}
    largest = max(generated, key=lambda file: (max(generated[file], default=0), len(generated[file])), default=None)
    for file, record in records.items():
        for entry in shown[file]:
            if entry["n_gen"] is not None and way_of_drawing(record) != way_of_drawing(records[largest]):
                continue
            # The id without the number of images: fid2k_full and fid50k_full are the same metric.
            metric = re.sub(r"(?<=[a-z_])\d+k?(?=_|$)", "", entry["id"])
            if metric not in best or quality(best[metric][1]) < quality(entry):
                best[metric] = file, entry
    return list(best.values())


def way_of_drawing(record: dict) -> dict:
    """Return the settings of a record's sampler that the images of one table must share: all but the seed."""
    return record["sampler"] | {"seed": None}


def quality(entry: dict) -> tuple[float, float]:
    """Return a key by which the score to show is the largest: first the number of images, then the value."""
    return images_used(entry), -entry["value"] if entry.get("lower_is_better") else entry["value"]


def images_used(entry: dict) -> float:
    """Return how many images a score was measured on: generated ones, or real ones if none were generated."""
    return (entry["n_ref"] if entry["n_gen"] is None else entry["n_gen"]) or 0


def is_quick_check(entry: dict, record: dict) -> bool:
    """Return whether a score was measured on no more images than in the suite "smoke", and not on all held-out."""
    smoke, held_out = SUITES["smoke"], (record["data"].get("held_out") or {}).get("n")
    if entry["n_gen"] is not None:
        return entry["n_gen"] <= smoke["num_images"]
    return images_used(entry) <= smoke["bound_images"] and entry["n_ref"] != held_out


def is_headline(id: str) -> bool:
    """Return whether a score belongs in the card's metadata: a distance or a likelihood, not a detail."""
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
    """Return whether bits/dim was measured on held-out images. Without any, it is measured on training images."""
    return hub_name(entry["id"]) == "bits_per_dim" and entry.get("extra", {}).get("split") != "train"


def path_here(folder: Path) -> str:
    """Return the path of a folder from the current one, or its name if it lies elsewhere: no path is published."""
    folder = folder.resolve()
    try:
        return folder.relative_to(Path.cwd()).as_posix() if folder != Path.cwd() else folder.name
    except (ValueError, OSError):
        return folder.name


def hub_name(id: str) -> str:
    """Return the Hub's name for the metric with this id, or the id itself if the Hub has no name for it."""
    known = {start: name for metric in METRICS.values() for start, name in metric.hub_names.items()}
    return next((name for start, name in known.items() if re.match(rf"{start}\d", id)), id)


def without_none(values: dict) -> dict:
    """Return a copy of a dict without the entries whose value is None. YAML would not keep them."""
    return {key: value for key, value in values.items() if value is not None}


def introduction(folder: Path, flags: dict, data: str | None, dataset_name: str | None, base: dict) -> str:
    """Return the introduction of the card: what the model is, its data, the model it started from, its classes.

    Args:
        data: --dataset_name or --train_data_dir.
        dataset_name: --dataset_name. None for images of the user.
        base: the "base_model" of train_config.json; {} without --init_from.
    """
    unet = read_json(folder / "unet" / "config.json", missing={}) or read_json(
        folder / "classifier" / "config.json", missing={}
    )
    classes = read_json(folder / "model_index.json", missing={}).get("id2label", {})
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
    """Return Markdown for the best sheet of samples, and for the animation from noise to images, if they exist.

    The best sheet is the one with guidance. A model without it has the last sheet of its training.
    """
    sheets = sorted(files_in(folder, ["samples/epoch_#.png"]), key=lambda sheet: (len(sheet.name), sheet.name))
    epochs = {f"Samples after epoch {int(sheet.stem.partition('_')[2])}, not selected": sheet for sheet in sheets[-1:]}
    guided = "Samples with guidance, one row for each class, not selected"
    shown = {guided: folder / "figures" / "guided.png"} if files_in(folder, ["figures/guided.png"]) else epochs
    if files_in(folder, ["figures/reverse.gif"]):
        shown["Samples on the way from noise to images"] = folder / "figures" / "reverse.gif"
    return [f"![{what}]({path.relative_to(folder).as_posix()})\n\n*{what}*" for what, path in shown.items()]


def classifier_usage(name: str) -> list[str]:
    """Return Markdown paragraphs that show how to load a classifier and guide a model with it."""
    return [
        code_block(
            "python",
            f"""from diffusers import AutoModel

classifier = AutoModel.from_pretrained({in_python(name)}, subfolder="classifier", trust_remote_code=True)""",
        ),
        "`ddpm_hf` can guide a model with this classifier, or export both to one folder that diffusers loads:",
        code_block(
            "bash",
            f"""python -m ddpm_hf sample MODEL --classifier {shlex.quote(name)} --guidance_scale 10 --sampler ddim
python -m ddpm_hf export MODEL my-export --classifier {shlex.quote(name)}""",
        ),
    ]


def usage(name: str, folder: Path) -> list[str]:
    """Return Markdown paragraphs that show how to load a model and sample from it."""
    unet = read_json(folder / "unet" / "config.json", missing={})
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", missing={})
    steps = scheduler.get("num_train_timesteps", 1000)
    index = read_json(folder / "model_index.json", missing={})
    named = index.get("_class_name")
    parts = []
    if isinstance(named, str) and unet.get("num_class_embeds") is None:
        call = f"""from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained({in_python(name)})
image = pipeline(num_inference_steps={steps}).images[0]"""
        parts.append("Stock diffusers loads this model without `ddpm_hf`:")
        parts.append(code_block("python", call))
        parts.append(fewer_steps(name, scheduler))
    classes = Classes.of_model(unet.get("num_class_embeds"), index.get("id2label"))
    needs_class = bool(classes) and classes.no_class is None
    for pipeline in EARLIER_PIPELINES | PIPELINES:
        if (folder / f"{pipeline}.py").is_file():
            parts.append(pipeline_usage(name, pipeline, is_default=named[0] == pipeline, needs_class=needs_class))
    model = shlex.quote(name)
    few = min(50, steps)
    commands = f"""python -m ddpm_hf sample {model} --num_images 64 --sampler ddim --num_inference_steps {few}
python -m ddpm_hf evaluate {model}"""
    return [*parts, "Sample many images and score them with `ddpm_hf`:", code_block("bash", commands)]


def fewer_steps(name: str, scheduler: dict) -> str:
    """Return a Markdown paragraph that says how stock diffusers draws in fewer than T steps.

    Stock DDPM adds noise after every step except at t = 0. In fewer steps, the spacing "trailing" ends above t = 0, so
    noise is added after the last step too.
    """
    steps, is_learned = scheduler["num_train_timesteps"], scheduler["variance_type"] == "learned_range"
    ends_at_0 = scheduler["timestep_spacing"] in ("leading", "linspace")
    few = min(50, steps)
    sentences = []
    if is_learned:
        sentences.append("`DDIMPipeline` cannot use this model, because the UNet also predicts a variance.")
    else:
        call = f"DDIMPipeline.from_pretrained({in_python(name)})(num_inference_steps={few}).images[0]"
        sentences.append(
            f"To draw in fewer steps: {code(call)}. If the number of steps divides {steps}, these are the images of "
            "`ddpm_hf sample --sampler ddim`."
        )
    if is_learned and ends_at_0:
        sentences.append(
            f"In fewer steps than {steps}, `DDPMPipeline` draws the images of `ddpm_hf sample --timesteps "
            f"{scheduler['timestep_spacing']}`."
        )
    elif scheduler["variance_type"] != "fixed_small":
        sentences.append(
            f"`DDPMPipeline` needs all {steps} steps: in fewer steps it leaves noise in the images, because it adds "
            "noise after the last step too."
        )
    return " ".join(sentences)


def in_python(name: str) -> str:
    """Return `name` as a Python string literal in double quotes."""
    return json.dumps(name, ensure_ascii=False)


def pipeline_usage(name: str, pipeline: str, *, is_default: bool, needs_class: bool) -> str:
    """Return a Markdown paragraph that shows how to load and call one of our pipelines.

    Args:
        is_default: whether the folder's model_index.json names this pipeline.
        needs_class: whether the model has no embedding for "no class", so that every image needs a class.
    """
    what, arguments = (EARLIER_PIPELINES | PIPELINES)[pipeline]
    if needs_class and pipeline in ("class_guided", "class_conditional"):
        arguments = "class_labels=[0]"
    elif needs_class and pipeline == "reconstruction":
        arguments += ", class_labels=0"
    which = "" if is_default else f'custom_pipeline="{pipeline}", '
    image = "from PIL import Image\n" if "Image" in arguments else ""
    call = f"""from diffusers import DiffusionPipeline
{image}
pipeline = DiffusionPipeline.from_pretrained({in_python(name)}, {which}trust_remote_code=True)
pipeline({arguments}).images[0].save("result.png")"""
    return f"{what}:\n\n{code_block('python', call)}"


def no_scores(records: dict[str, dict], name: str) -> str:
    """Return Markdown that says why no scores are shown, and how to get some."""
    entries = [entry for record in records.values() for entry in record["metrics"]]
    command = code(f"python -m ddpm_hf evaluate {shlex.quote(name)}")
    scored = f"{SUITES['fast']['num_images']:,} images"
    if all(entry.get("value") is None for entry in entries):
        return f"Not scored yet: {command} scores {scored}, and adds the scores here."
    most = SUITES["smoke"]["num_images"]
    return (
        f"Only a quick check was made (`--suite smoke`), which is too small for its scores to be shown: {command} "
        f"scores {scored}, and more than {most} are enough."
    )


def scores(records: dict[str, dict], chosen: list[tuple[str, dict]], name: str) -> str:
    """Return Markdown with tables of the chosen scores, and how each of their records was measured.

    The scores about copying have a table of their own, because neither direction is better.
    """
    if not chosen:
        return no_scores(records, name)
    files = list(dict.fromkeys(file for file, _ in chosen))
    quality = [["score", "", "value", "real images", "images", "measured"]]
    copying = [["about copying", *quality[0][2:]]]
    for file, entry in chosen:
        words, error = in_words(entry["id"]), number(entry["se"])
        if words and entry.get("extra", {}).get("split") == "train":
            words += ", on training images"
        direction = {True: "↓ lower is better", False: "↑ higher is better"}.get(entry.get("lower_is_better"), "")
        is_copying = is_about_copying(entry["id"])
        (copying if is_copying else quality).append(
            [
                f"{words} ({code(entry['id'])})" if words else code(entry["id"]),
                *([] if is_copying else [direction]),
                number(entry["value"]) + (f" ± {error}" if error else ""),
                number(entry["floor"]),
                number(images_used(entry)),
                f"[{files.index(file) + 1}](evaluations/{quote(file)})",
            ]
        )
    what = (
        "The column “real images” has the score of as many real, held-out images, or of all if fewer are held out. A "
        "good model comes close to it. "
        "“images” is how many were scored. “measured” links to the record, which has every detail:"
    )
    if any(entry["id"] == "bits_per_dim" for _, entry in chosen):
        what = f"{NOTHING_KNOWN} {what}"
    tables = [table(quality, markdown=True)] if len(quality) > 1 else []
    tables += [COPYING, table(copying, markdown=True)] if len(copying) > 1 else []
    ways = [f"{k}. {measured(records[file])}" for k, file in enumerate(files, 1)]
    commands = "\n".join(records[file]["command"] for file in files if records[file].get("command"))
    details = f"<details><summary>Commands</summary>\n\n{code_block('bash', commands)}\n\n</details>"
    return "\n\n".join([*tables, what, "\n".join(ways), *([details] if commands else [])])


def measured(record: dict) -> str:
    """Return a sentence in Markdown that says how the scores of a record were measured."""
    sampler, data, cost = record["sampler"], record["data"], record["cost"]
    steps = literal(sampler.get("num_inference_steps"))
    how = [f"{literal(sampler['method'].upper())} in {steps} steps"] if "method" in sampler else []
    how += [f"{key} {literal(sampler[key])}" for key in ("eta", "seed", "guidance_scale") if key in sampler]
    how += [f"weights: {literal(record['model']['weights'])}"] if "weights" in record["model"] else []
    against = f"against {code(data['name'])} ({number(data['train'].get('n'))} training images"
    against += f", {number(data['held_out'].get('n'))} held out)" if data.get("held_out") else ")"
    spent = f"drawn in {number(cost.get('drawing_s'))} s, scored in {number(cost.get('scoring_s'))} s"
    sentence = f"{', '.join(how)}; {against}; {spent}."
    return f"{sentence[0].upper()}{sentence[1:]}"


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
    recipe = f"The recipe is the preset `{flags['preset']}`: {preset.about}. " if preset else ""
    recipe += "The sources of the presets' numbers are in `ddpm_hf/config/presets.py`."
    groups = [group for group in GROUPS if group not in (OutputOptions, EvaluationOptions, HubOptions)]
    fields = [field for group in groups for field in dataclasses.fields(group) if field.name in flags]
    # Show 0, False and an empty list only where the default is another value.
    shown = [
        [f"`{field.name}`", literal(flags[field.name])]
        for field in fields
        if field.name != "local_rank" and (flags[field.name] or flags[field.name] != field.default)
    ]
    curve = ["![Loss](figures/loss.png)"] if files_in(folder, ["figures/loss.png"]) else []
    return [
        "## Training\n\n" + code_block("bash", run["command"]) if run.get("command") else "## Training",
        table([["", "value"], *rows], markdown=True),
        *curve,
        f"{recipe} Every flag is in [train_config.json](train_config.json), every logged step in "
        "[metrics.jsonl](metrics.jsonl).",
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
    """Return the paragraph about the data's origin, and the licence of the model."""
    model = f" The licence of the model: `{licence}`." if licence else ""
    return f"## Data and licence\n\nThe images: {about_data}{model}"
