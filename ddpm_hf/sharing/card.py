"""The model card: README.md of a folder, from what the folder holds, and from nothing else.

Every number in it is read from a record: train_config.json, metrics.jsonl, evaluations/*.json. What has no record is
said to be unknown.
"""

import dataclasses
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..config.presets import PRESETS
from ..config.training_config import GROUPS, EvaluationOptions, HubOptions, OutputOptions
from ..errors import UserError
from ..evaluation.metrics import METRICS
from ..evaluation.records import SCHEMA, data_name, number, read_record, table
from ..files import read_json, write_beside
from ..provenance import without_paths
from .hub import is_hub_id
from .licences import LICENCES, UNKNOWN_LICENCE


def eval_results(record: dict) -> list[EvalResult]:
    """Return the numbers of a record as the Hub's model cards hold them, each with its protocol in `metric_args`."""
    data, sampler = record["data"], record["sampler"]
    results = []
    for entry in record["metrics"]:
        kind = hub_name(entry["id"])
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


def hub_name(id: str) -> str:
    """Return what the Hub calls the metric of an entry: the id itself where it has no name of its own."""
    known = {start: name for metric in METRICS.values() for start, name in metric.hub_names.items()}
    return next((name for start, name in known.items() if re.match(rf"{start}\d", id)), id)


def without_none(values: dict) -> dict:
    """Return what YAML would keep."""
    return {key: value for key, value in values.items() if value is not None}


MARKER = r"<!-- ddpm_hf: (\S+) -->"  # with the name that the card was written for
# What each pipeline file does, and a call that shows it.
PIPELINES = {
    "class_guided": ("Images of a class, guided towards it", "class_labels=[0], guidance_scale=2.0"),
    "restoration": ("Mends noisy, masked, small, grey or blurred images", 'Image.open("noisy.png"), task="denoise"'),
    "reconstruction": ("Images to noise and back, and between two images", 'Image.open("image.png")'),
}
# class_guided.py was two files once. Folders saved then hold one of these, which their cards go on showing.
EARLIER = dict.fromkeys(["class_conditional", "classifier_guided"], PIPELINES["class_guided"])
TRAINING = {
    "parameters": "Parameters",
    "num_images": "Training images",
    "step": "Optimizer steps",
    "images_seen": "Images seen",
    "seconds": "Seconds of training",
    "images_per_second": "Images per second, last",
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
    """Refuse, with a UserError, a folder that is neither a run's nor an export."""
    if not (folder / "model_index.json").is_file() and not (folder / "classifier").is_dir():
        raise UserError(f"{folder} has no model: give the --output_dir of a run, or an export.")


def write_card(folder: str | Path, name: str | None = None) -> bool:
    """Write README.md, the model card of a run or an export; return False where a card not of ours was kept.

    Args:
        folder: with a pipeline, or a classifier. What else it has is shown: a run's records and pictures, scores in
            evaluations/, the files of pipelines.
        name: of the repository, e.g. "me/ddpm-cifar10"; if none is given, the one it was pushed to last, the run's
            --hub_model_id or the folder's.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    before = re.search(MARKER, readme.read_text(encoding="utf-8")) if readme.exists() else None
    if readme.exists() and before is None:
        return False
    run = without_paths(read_json(folder / "train_config.json", missing={}))
    flags = run.get("flags", {})
    pushed_to = before[1] if before is not None and "/" in before[1] else None
    name = name or pushed_to or flags.get("hub_model_id") or folder.resolve().name
    found = [path for path in sorted(folder.glob("evaluations/*.json")) if SCHEMA in path.read_text(encoding="utf-8")]
    records = {path.name: read_record(path) for path in found}
    data = flags.get("dataset_name") or flags.get("train_data_dir")
    on_hub = data is not None and is_hub_id(data)
    licence, of_data = next(
        (found for name, found in LICENCES.items() if re.fullmatch(name, str(data), re.IGNORECASE)), UNKNOWN_LICENCE
    )

    task = "image-classification" if flags.get("objective") == "classify" else "unconditional-image-generation"
    about = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", "ddpm", task, "pytorch", "ddpm_hf"],
        datasets=[data] if on_hub else None,
        model_name=name.rpartition("/")[2] if records else None,
        eval_results=[result for record in records.values() for result in eval_results(record)] or None,
    )
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"<!-- ddpm_hf: {name} -->\n# {name.rpartition('/')[2]}",
        introduction(folder, flags, data, on_hub),
        *pictures(folder),
        "## Use\n\n" + "\n\n".join(usage(name, folder, flags)),
        "## Scores\n\n" + scores(records),
        *training(folder, run),
        "## Limits\n\n" + limits(flags, data, records),
        f"## Data\n\nThe images: {of_data}" if data else "",
    ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_beside(readme, lambda partial: partial.write_text(text, encoding="utf-8"))
    return True


def introduction(folder: Path, flags: dict, data: str | None, on_hub: bool) -> str:
    """Return the sentence that says what the model is."""
    unet = read_json(folder / "unet" / "config.json", missing={}) or read_json(
        folder / "classifier" / "config.json", missing={}
    )
    size, classes = unet.get("sample_size"), read_json(folder / "model_index.json", missing={}).get("id2label", {})
    kind = "A denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239))"
    if flags.get("objective") == "classify":
        kind = "A classifier of noisy images, to guide a DDPM of the same data and schedule,"
    elif unet.get("num_class_embeds") is not None:
        kind = "A class-conditional denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239))"
    if on_hub:
        data = f"[{data}](https://huggingface.co/datasets/{data})"
    elif data is not None:
        data = "scikit-learn's handwritten digits" if data == "digits" else f"`{data_name(data)}`"
    asked = f" Its classes: {', '.join(classes[k] for k in sorted(classes, key=int))}." if classes else ""
    return f"{kind} of {size}x{size} images, {f'trained on {data} ' if data else ''}with `ddpm_hf`.{asked}"


def pictures(folder: Path) -> list[str]:
    sheets = sorted(folder.glob("samples/epoch_*.png"), key=lambda sheet: (len(sheet.name), sheet.name))
    shown = {f"Samples, `{sheet.stem}`": sheet for sheet in sheets[-1:]}
    shown |= {"From noise to images": folder / "figures" / "reverse.gif"}
    return [
        f"![{what}]({path.relative_to(folder).as_posix()})\n\n*{what}*"
        for what, path in shown.items()
        if path.is_file()
    ]


def usage(name: str, folder: Path, flags: dict) -> list[str]:
    """Return paragraphs that load the model and draw with it, in Markdown."""
    if flags.get("objective") == "classify":
        return [
            f"""```python
from diffusers import AutoModel

classifier = AutoModel.from_pretrained("{name}", subfolder="classifier", trust_remote_code=True)
```""",
            f"With `ddpm_hf`, to guide a model, or to pack both into one that stock diffusers loads:\n\n```bash\n"
            f"python -m ddpm_hf sample MODEL --classifier {name} --guidance_scale 10 --sampler ddim\n"
            f"python -m ddpm_hf export MODEL my-export --classifier {name}\n```",
        ]
    unet, scheduler = (
        read_json(folder / "unet" / "config.json", missing={}),
        read_json(folder / "scheduler/scheduler_config.json", missing={}),
    )
    index, steps = read_json(folder / "model_index.json", missing={}), scheduler["num_train_timesteps"]
    named, classes = index["_class_name"], index.get("id2label", {})
    parts = []
    if isinstance(named, str) and unet["num_class_embeds"] is None:
        parts.append(f"""It loads in stock diffusers, once it is on the Hub or from the folder that it lies in:

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{name}")
image = pipeline(num_inference_steps={steps}).images[0]
```""")
        if scheduler["variance_type"] == "learned_range":
            parts.append("`DDIMPipeline` cannot use it: its UNet predicts a variance beside the noise.")
        else:
            parts.append(
                f'In fewer steps: `DDIMPipeline.from_pretrained("{name}")'
                f"(num_inference_steps={min(50, steps)}).images[0]`."
            )
    has_no_class = (unet["num_class_embeds"] or 0) > len(classes)
    for pipeline, (what, arguments) in (EARLIER | PIPELINES).items():
        if not (folder / f"{pipeline}.py").is_file():
            continue
        if unet["num_class_embeds"] and not has_no_class:
            only = {
                "class_guided": "class_labels=[0]",
                "class_conditional": "class_labels=[0]",
                "reconstruction": 'Image.open("image.png"), class_labels=0',
            }
            arguments = only.get(pipeline, arguments)
        which = "" if named[0] == pipeline else f'custom_pipeline="{pipeline}", '
        image = "from PIL import Image\n" if "Image" in arguments else ""
        parts.append(f"""{what}:

```python
from diffusers import DiffusionPipeline
{image}
pipeline = DiffusionPipeline.from_pretrained("{name}", {which}trust_remote_code=True)
pipeline({arguments}).images[0].save("result.png")
```""")
    parts.append(f"""With `ddpm_hf`, many at a time, and scored:

```bash
python -m ddpm_hf sample {name} --num_images 64 --sampler ddim --num_inference_steps {min(50, steps)}
python -m ddpm_hf evaluate {name}
```""")
    return parts


def scores(records: dict[str, dict]) -> str:
    """Return a table of each record's numbers, under the words that say how they came about."""
    parts = []
    for file, record in records.items():
        sampler, data, cost = record["sampler"], record["data"], record["cost"]
        how = [f"{sampler['method'].upper()} in {sampler['num_inference_steps']} steps"] if "method" in sampler else []
        how += [f"{key} {sampler[key]}" for key in ("eta", "seed", "guidance_scale") if key in sampler]
        how += [f"weights: {record['model']['weights']}"] if "weights" in record["model"] else []
        rows = [["metric", "value", "+-", "floor (real images)", "N", "N real"]]
        rows += [
            [f"`{entry['id']}`", *(number(entry[key]) for key in ("value", "se", "floor", "n_gen", "n_ref"))]
            for entry in record["metrics"]
            if entry.get("status") != "skipped"
        ]
        against = f"against `{data['name']}` ({number(data['train']['n'])} training images"
        against += f", {number(data['held_out']['n'])} held out)" if data["held_out"] else ")"
        spent = f"drawn in {number(cost['drawing_s'])} s, scored in {number(cost['scoring_s'])} s"
        told = f"{', '.join(how)}; {against}; {spent}; [record](evaluations/{file})."
        command = f"\n\n```bash\n{record['command']}\n```" if record.get("command") else ""
        parts.append(f"{told[0].upper()}{told[1:]}{command}\n\n{table(rows, markdown=True)}")
    return "\n\n".join(parts) or "Not scored yet: `python -m ddpm_hf evaluate` writes the record that belongs here."


def training(folder: Path, run: dict) -> list[str]:
    """Return the paragraphs on how a run came about: its command, cost, recipe and curve."""
    if not run:
        return []
    flags, lines = run["flags"], folder / "metrics.jsonl"
    last = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []:
        last |= {key: value for key, value in json.loads(line).items() if value is not None}
    known = {TRAINING[key]: (run | last).get(key) for key in TRAINING}
    rows = [[what, value if isinstance(value, str) else number(value)] for what, value in known.items() if value]
    preset = PRESETS.get(flags.get("preset"))
    recipe = f"The recipe is the preset `{flags['preset']}`: {preset.about}. " if preset else ""
    recipe += "Sources of the presets' numbers are in `ddpm_hf/config/presets.py`."
    groups = [group for group in GROUPS if group not in (OutputOptions, EvaluationOptions, HubOptions)]
    fields = [field for group in groups for field in dataclasses.fields(group) if field.name in flags]
    # 0, False and an empty list are told only where they say something: where the default is another.
    told = [
        [f"`{field.name}`", str(flags[field.name])]
        for field in fields
        if field.name != "local_rank" and (flags[field.name] or flags[field.name] != field.default)
    ]
    curve = ["![Loss](figures/loss.png)"] if (folder / "figures" / "loss.png").is_file() else []
    return [
        f"## Training\n\n```bash\n{run['command']}\n```" if run.get("command") else "## Training",
        table([["", "value"], *rows], markdown=True),
        *curve,
        f"{recipe} Every flag is in [train_config.json](train_config.json), every logged step in "
        "[metrics.jsonl](metrics.jsonl).",
        f"<details><summary>Flags</summary>\n\n{table([['flag', 'value'], *told], markdown=True)}\n\n</details>",
    ]


def limits(flags: dict, data: str | None, records: dict[str, dict]) -> str:
    """Return what the model cannot do, and what nobody has measured."""
    entries = {entry["id"]: entry for record in records.values() for entry in record["metrics"]}
    told = [f"It knows images like those of `{data_name(data)}` and no others."] if data else []
    copies = entries.get("memorization_exact_copies", {}).get("value")
    if copies is None:
        told.append("How much of its training images it repeats was not measured.")
    else:
        of = number(entries["memorization_exact_copies"]["n_gen"])
        told.append(f"Of {of} generated images {number(copies)} are copies of training images, pixel by pixel.")
    if records:
        told.append("Its scores compare with others of the same N, reference, sampler and extractor only.")
    if flags.get("variance_type") == "learned_range":
        told.append("Samplers that cannot split its output (noise, variance) cannot use it.")
    return " ".join(told)
