"""A model and the pipeline files that it can use, in one folder: whoever loads it needs diffusers, nothing of ours."""

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from . import UserError
from .checkpoints import writing
from .guidance import check_classifier
from .hub import save_classifier, save_pipeline
from .pretrained import Pretrained, load_classifier, load_pretrained


# What each pipeline file does, and a line that shows it.
PIPELINES = {
    "class_conditional": ("Images of a class, with classifier-free guidance", "class_labels=[0], guidance_scale=2.0"),
    "classifier_guided": ("Images of a class, by a classifier's guidance", "class_labels=[0], guidance_scale=2.0"),
    "restoration": ("Mends noisy, masked, small, grey or blurred images", 'Image.open("noisy.png"), task="denoise"'),
    "reconstruction": ("Images to noise and back, and between two images", 'Image.open("image.png")'),
}


def pipeline_file(name: str) -> Path:
    """Return the file of our community pipeline `name`, e.g. "restoration", in a wheel or in the source tree."""
    here = Path(__file__).parent
    folder = here / "pipelines" if (here / "pipelines").is_dir() else here.parent / "pipelines"
    return folder / f"{name}.py"


def export_command(arguments):
    """Run `python -m ddpm_hf export` with its parsed flags."""
    model = load_pretrained(arguments.model, arguments.weights)
    classifier = None if arguments.classifier is None else load_classifier(arguments.classifier)
    names = export(model, arguments.output, classifier)
    print(
        f"{arguments.output} has the model and its pipelines: {', '.join(names)}. Its README.md says how to load them."
    )


def export(model: Pretrained, output: str | Path, classifier=None) -> list[str]:
    """Write a folder that stock diffusers loads, with the pipeline files that suit the model; return their names.

    `DDPMPipeline.from_pretrained(output)` is the model as ever; `DiffusionPipeline.from_pretrained(output,
    custom_pipeline=NAME, trust_remote_code=True)` is one of the pipelines; from the folder, or a Hub repository of it.

    Args:
        classifier: a NoisyClassifier that travels with an unconditional model, for guidance, or None.

    Raises:
        UserError: if the folder is there already or cannot be written, or for a classifier of other images.
    """
    output, config = Path(output), model.unet.config
    conditional = config.num_class_embeds is not None
    if output.exists():
        raise UserError(f"{output} is there already: give another folder, or remove it.")
    if classifier is not None:
        check_classifier(classifier, model.unet, model.scheduler)
    suits = {
        "class_conditional": conditional,
        "classifier_guided": classifier is not None,
        "restoration": not conditional or config.num_class_embeds > model.num_classes,  # it needs "no class"
        "reconstruction": True,
    }
    names = [name for name in PIPELINES if suits[name]]
    new = output.with_name(f".{output.name}.tmp")
    with writing("the export", output):
        shutil.rmtree(new, ignore_errors=True)  # left by a kill
        new.mkdir(parents=True)
        save_pipeline(new, model.unet, model.scheduler, model.class_names)
        if classifier is not None:
            save_classifier(new, classifier)
            index = json.loads((new / "model_index.json").read_text())
            index["classifier"] = ["classifier", "NoisyClassifier"]  # the class in classifier/classifier.py
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in names:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        (new / "README.md").write_text(card(output.resolve().name, model, names), encoding="utf-8")
        new.rename(output)
    return names


def card(name: str, model: Pretrained, names: list[str]) -> str:
    """Return the page of an exported model: what it is, and how each of its pipelines is loaded."""
    about = ModelCardData(library_name="diffusers", tags=["diffusers", "ddpm", "ddpm_hf"]).to_yaml()
    size, classes = model.unet.config.sample_size, ", ".join(model.class_names or [])
    kind = f"class-conditional DDPM (classes: {classes})" if classes else "DDPM"
    parts = [
        f"---\n{about}\n---\n\n# {name}\n\nA {kind} of {size}x{size} images, trained with `ddpm_hf`; "
        f"{model.facts['parameters']:,} parameters, UNet `{model.facts['unet_sha256'][:12]}`."
    ]
    has_no_class = (model.unet.config.num_class_embeds or 0) > model.num_classes
    for pipeline in names:
        what, arguments = PIPELINES[pipeline]
        if classes and not has_no_class:
            arguments = {
                "class_conditional": "class_labels=[0]",
                "reconstruction": 'Image.open("image.png"), class_labels=0',
            }[pipeline]
        parts.append(f"{what}:\n\n```python\n{snippet(name, pipeline, arguments)}\n```")
    return "\n\n".join(parts) + "\n"


def snippet(name: str, pipeline: str, arguments: str) -> str:
    """Return the Python that loads an exported model's pipeline and calls it."""
    return f"""from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{pipeline}", trust_remote_code=True)
pipeline({arguments}).images[0].save("result.png")"""
