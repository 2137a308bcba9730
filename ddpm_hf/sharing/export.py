"""A model and the pipeline files that it can use, in one folder: whoever loads it needs diffusers, nothing of ours."""

import shutil
from pathlib import Path

from ..community_pipelines import pipeline_file
from ..errors import UserError
from ..files import read_json, write_json, writing
from ..models.pretrained import Pretrained
from ..models.saving import save_classifier, save_pipeline
from ..provenance import hide_paths
from ..run_folder import PRIVATE, RECORDS
from ..sampling.guidance import check_classifier
from .card import PIPELINES, write_card


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
        "restoration": not conditional or model.classes.no_class is not None,
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
        save_pipeline(new, model.unet, model.scheduler, model.classes.names, pipeline)
        if classifier is not None:
            save_classifier(new, classifier)
            index = read_json(new / "model_index.json")
            index["classifier"] = ["classifier", "NoisyClassifier"]  # the class in classifier/classifier.py
            write_json(new / "model_index.json", index)
        for name in names:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        for path in (model.run_folder / name for name in RECORDS):
            if path.is_dir():
                patterns = [Path(private).name for private in PRIVATE if Path(private).parent.name == path.name]
                shutil.copytree(path, new / path.name, ignore=shutil.ignore_patterns(*patterns))
            elif path.is_file():
                shutil.copyfile(path, new / path.name)
        hide_paths(new)
        write_card(new, output.resolve().name)
        new.rename(output)
    return names
