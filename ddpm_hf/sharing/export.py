"""Export a model and the pipeline files that suit it into one folder. Loading the folder needs only diffusers."""

import shutil
from pathlib import Path

from ..community_pipelines import pipeline_file
from ..errors import UserError, suggestion
from ..files import check_new_output, is_utf_8, new_folder, read_json, write_json, writing
from ..models.classifier import NoisyClassifier
from ..models.pretrained import Pretrained, load_classifier, load_pretrained, published_hash
from ..models.saving import save_classifier, save_pipeline
from ..provenance import without_paths
from ..run_folder import RECORDS, keep_metrics_up_to
from ..sampling.guidance import check_classifier
from .card import write_card
from .card_usage import PIPELINES
from .published import copy_published


def export(
    model: str | Path | Pretrained,
    output: str | Path,
    *,
    classifier: str | Path | NoisyClassifier | None = None,
    pipeline: str | None = None,
    weights: str = "published",
) -> list[str]:
    """Write a folder that stock diffusers loads, and return the names of the pipeline files in it.

    The folder has every pipeline file that suits the model. To load the default pipeline, call
    `DiffusionPipeline.from_pretrained(output, trust_remote_code=True)`. To load another one, add
    `custom_pipeline=NAME`. After a push to the Hub, the repository can be loaded in the same way. The records and
    pictures of a run are copied too, and the card shows them. For the weights of an earlier checkpoint, its pictures
    and later log lines are left out.

    Args:
        model: a folder, a checkpoint, a Hub id, or the result of `load`.
        output: a folder that does not exist yet. Nothing is overwritten.
        classifier: a classifier to guide an unconditional model: a run of --objective classify, a Hub id, or the
            classifier itself.
        pipeline: the default pipeline of the folder. None: class_guided for a model with classes or a classifier, else
            stock `DDPMPipeline`, which loads without trust_remote_code.
        weights: published or raw, see `load`.

    Raises:
        UserError: if the folder exists or cannot be written, or if the classifier or the pipeline does not suit the
            model.

    Example:
        >>> ddpm_hf.export("runs/digits", "my-export")
        ['restoration', 'reconstruction']
        >>> pipeline = DDPMPipeline.from_pretrained("my-export")
    """
    if not isinstance(model, Pretrained):
        model = load_pretrained(model, weights)
    if isinstance(classifier, (str, Path)):
        classifier = load_classifier(str(classifier))
    output = check_new_output("OUTPUT", output)
    conditional = model.unet.config.num_class_embeds is not None
    if not is_utf_8(output.absolute()):
        raise UserError(
            f"{str(output)!r} is in a path that is not UTF-8, and safetensors cannot load files from there: give "
            "another folder."
        )
    if classifier is not None:
        check_classifier(classifier, model.unet, model.scheduler)
    suits = {
        "class_guided": conditional or classifier is not None,
        "restoration": not conditional or model.classes.no_class is not None,
        "reconstruction": True,
    }
    names = [name for name in PIPELINES if suits[name]]
    if pipeline is not None and pipeline not in names:
        raise UserError(f"--pipeline {pipeline} does not suit this model: {suggestion(pipeline, names)}")
    if pipeline is None and (conditional or classifier is not None):
        pipeline = names[0]
    with writing("the export", output), new_folder(output) as new:
        save_pipeline(new, model.unet, model.scheduler, model.classes.names, pipeline)
        if classifier is not None:
            save_classifier(new, classifier)
            index = read_json(new / "model_index.json")
            index["classifier"] = ["classifier", "NoisyClassifier"]  # the class in classifier/classifier.py
            write_json(new / "model_index.json", index)
        for name in names:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        if model.run_folder == model.folder or published_hash(model.run_folder) == model.facts["unet_sha256"]:
            copy_published(model.run_folder, new, RECORDS)
        else:  # the pictures and the later log lines of the run are about other weights
            step = model.facts["train_step"]
            metrics = [] if step is None else ["metrics.jsonl"]
            copy_published(model.run_folder, new, ["train_config.json", *metrics, "evaluations/*.json"])
            keep_metrics_up_to(new, step)
        if (
            model.facts["revision"] is not None and model.run
        ):  # files in the Hub's cache are links, which copy_published leaves out
            write_json(new / "train_config.json", without_paths(model.run))
        write_card(new, output.resolve().name, place=output)
    return names
