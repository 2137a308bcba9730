"""A model and the pipeline files that it can use, in one folder: whoever loads it needs diffusers, nothing of ours."""

import json
import shutil
from pathlib import Path

from . import UserError
from .card import PIPELINES, write_card
from .checkpoints import writing
from .guidance import check_classifier
from .hub import PRIVATE
from .pretrained import Pretrained, load_classifier, load_pretrained
from .record import hide_paths
from .saving import pipeline_file, save_classifier, save_pipeline


# What a run has that says how its model came about and how good it is; `best/` and checkpoints stay behind.
RECORDS = ["train_config.json", "metrics.jsonl", "samples", "figures", "evaluations"]


def export_command(arguments):
    """Run `python -m ddpm_hf export` with its parsed flags."""
    model = load_pretrained(arguments.model, arguments.weights)
    classifier = None if arguments.classifier is None else load_classifier(arguments.classifier)
    names = export(model, arguments.output, classifier, arguments.pipeline)
    print(
        f"{arguments.output} has the model and its pipelines: {', '.join(names)}. Its README.md says how to load them."
    )


def export(model: Pretrained, output: str | Path, classifier=None, pipeline: str | None = None) -> list[str]:
    """Write a folder that stock diffusers loads, with the pipeline files that suit the model; return their names.

    `DiffusionPipeline.from_pretrained(output, trust_remote_code=True)` is `pipeline`, from the folder or a Hub
    repository of it, and with `custom_pipeline=NAME` it is another of them. The records and pictures of a run come
    along, and its card shows them.

    Args:
        classifier: a NoisyClassifier that travels with an unconditional model, for guidance, or None.
        pipeline: that the index names; by default class_guided for a conditional model or with a classifier, else
            stock `DDPMPipeline`, which needs no trust in code.

    Raises:
        UserError: if the folder is there already or cannot be written, for a classifier of other images, or a
            pipeline that does not suit the model.
    """
    output, config = Path(output), model.unet.config
    conditional = config.num_class_embeds is not None
    if output.exists():
        raise UserError(f"{output} is there already: give another folder, or remove it.")
    if classifier is not None:
        check_classifier(classifier, model.unet, model.scheduler)
    suits = {
        "class_guided": conditional or classifier is not None,
        "restoration": not conditional or config.num_class_embeds > model.num_classes,  # it needs "no class"
        "reconstruction": True,
    }
    names = [name for name in PIPELINES if suits[name]]
    if pipeline is not None and pipeline not in names:
        raise UserError(f"--pipeline {pipeline} does not suit this model: choose from {', '.join(names)}.")
    if pipeline is None and (conditional or classifier is not None):
        pipeline = names[0]
    new = output.with_name(f".{output.name}.tmp")
    with writing("the export", output):
        shutil.rmtree(new, ignore_errors=True)  # left by a kill
        new.mkdir(parents=True)
        save_pipeline(new, model.unet, model.scheduler, model.class_names, pipeline)
        if classifier is not None:
            save_classifier(new, classifier)
            index = json.loads((new / "model_index.json").read_text())
            index["classifier"] = ["classifier", "NoisyClassifier"]  # the class in classifier/classifier.py
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in names:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        of_run = model.folder.parent if (model.folder / "state.pt").is_file() else model.folder  # of a checkpoint
        for path in (of_run / name for name in RECORDS):
            if path.is_dir():
                patterns = [Path(private).name for private in PRIVATE if Path(private).parent.name == path.name]
                shutil.copytree(path, new / path.name, ignore=shutil.ignore_patterns(*patterns))
            elif path.is_file():
                shutil.copyfile(path, new / path.name)
        hide_paths(new)
        write_card(new, output.resolve().name)
        new.rename(output)
    return names
