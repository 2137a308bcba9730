"""The part of a model card that says how to use the model: commands and Python, for the files in its folder."""

import json
import shlex
from pathlib import Path

from ..files import read_json
from ..markdown import code, code_block
from ..models.classes import Classes


# For each pipeline file: what it does, and the arguments of an example call.
PIPELINES = {
    "class_guided": ("Generate images of a class, with guidance", "class_labels=[0], guidance_scale=2.0"),
    "restoration": ("Restore noisy, masked, small, grey or blurred images", 'Image.open("noisy.png"), task="denoise"'),
    "reconstruction": ("Turn an image into noise and back, or blend two images", 'Image.open("image.png")'),
}
# class_guided.py was once two files. Folders from that time hold one of the two, and their cards still describe it.
EARLIER_PIPELINES = dict.fromkeys(["class_conditional", "classifier_guided"], PIPELINES["class_guided"])


def path_here(folder: Path) -> str:
    """Return a folder's path relative to the current folder, or only its name if it is not inside."""
    folder = folder.resolve()
    try:
        return folder.relative_to(Path.cwd()).as_posix() if folder != Path.cwd() else folder.name
    except (ValueError, OSError):
        return folder.name


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

    `DDPMPipeline` adds noise after every step, except after a step at t = 0. In fewer than T steps, the spacing
    "trailing" has no step at t = 0, so noise is added after the last step too.
    """
    steps, is_learned = scheduler["num_train_timesteps"], scheduler["variance_type"] == "learned_range"
    ends_at_0 = scheduler["timestep_spacing"] in ("leading", "linspace")
    few = min(50, steps)
    sentences = []
    named = None if scheduler.get("trained_betas") else scheduler["beta_schedule"]
    if is_learned:
        sentences.append("`DDIMPipeline` cannot use this model, because the UNet also predicts a variance.")
    elif named in ("sigmoid", "laplace"):
        sentences.append(f"`DDIMPipeline` cannot use this model, because it does not know the noise schedule {named}.")
    else:
        call = f"DDIMPipeline.from_pretrained({in_python(name)})(num_inference_steps={few}).images[0]"
        sentences.append(
            f"To draw in fewer steps: {code(call)}. If the number of steps divides {steps}, the images are those "
            "that `ddpm_hf sample --sampler ddim` draws."
        )
    if is_learned and ends_at_0:
        sentences.append(
            f"In fewer steps than {steps}, `DDPMPipeline` draws the same images as `ddpm_hf sample --timesteps "
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
