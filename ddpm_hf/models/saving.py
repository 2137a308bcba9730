"""Save a UNet as stock diffusers' `DDPMPipeline`, or save a classifier together with its code.

The model_index.json of a run names only classes of diffusers, so the model loads where ddpm_hf is not installed. Stock
diffusers has no class-conditional pipeline, so for a conditional UNet we save our own pipeline file next to the
weights.
"""

import contextlib
import copy
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ..community_pipelines import pipeline_file
from ..files import read_json, write_json
from ..provenance import hide_paths


def save_pipeline(
    folder: str | Path, unet, scheduler, class_names: list[str] | None = None, pipeline: str | None = None
):
    """Save the UNet (float32 safetensors) and the scheduler as stock diffusers' `DDPMPipeline`.

    A pipeline that is already in the folder is replaced. Other files in the folder stay, and `unet` is not changed.
    For a conditional UNet, the file class_guided.py is saved too. It is used by
    `DiffusionPipeline.from_pretrained(folder, custom_pipeline="class_guided", trust_remote_code=True)`.

    Args:
        class_names: written to model_index.json as `id2label`, as DiTPipeline does.
        pipeline: the name of one of our pipelines. Its file is saved too, and model_index.json names it, so that
            loading needs no `custom_pipeline`. (For such a folder, diffusers 0.42 ignores a `custom_pipeline` that is
            the path of a file elsewhere.)
    """
    conditional = unet.config.num_class_embeds is not None
    with _replacing_files(folder) as new:
        spacing = stock_spacing(scheduler.config.variance_type)
        published = DDPMScheduler.from_config(scheduler.stock().config, timestep_spacing=spacing)
        DDPMPipeline(_in_float32(unet), published).save_pretrained(new)
        index = read_json(new / "model_index.json")
        if class_names is not None:
            index["id2label"] = dict(enumerate(class_names))
        for name in {pipeline, "class_guided" if conditional else None} - {None}:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        if pipeline is not None:
            code = pipeline_file(pipeline).read_text(encoding="utf-8")
            index["_class_name"] = [pipeline, re.search(r"^class (\w+)\(DiffusionPipeline\)", code, re.MULTILINE)[1]]
        write_json(new / "model_index.json", index)


def stock_spacing(variance_type: str) -> str:
    """Return the `timestep_spacing` to publish. It matters only to stock pipelines that take S < T steps.

    Models with learned_range get "linspace", the spacing of Nichol & Dhariwal, whose last timestep is 0. The last
    timestep of "trailing" is above 0. Stock DDPM adds noise after every step except the one at t = 0, so with
    "trailing" its images would have visible noise. (Stock DDIM cannot use a UNet that predicts its variance.)

    All other models get "trailing", the default of our own samplers. With fixed_small, the noise that stock DDPM adds
    after the last step is only 1e-10. With fixed_large, stock DDPM needs all T steps, as the model card says. If S
    divides T, stock DDIM draws the same images as our DDIM. Otherwise a step of stock DDIM goes from t to t - T//S,
    which is not the next timestep. (With "linspace" this would happen for every S < T.)
    """
    return "linspace" if variance_type == "learned_range" else "trailing"


def save_classifier(folder: str | Path, classifier):
    """Save a classifier of noisy images (float32 safetensors) and the file with its code in `folder`/classifier."""
    with _replacing_files(folder) as new:
        _in_float32(classifier).save_pretrained(new / "classifier")


def _in_float32(network):
    """Return the network itself if it is float32, else a float32 copy."""
    return network if network.dtype == torch.float32 else copy.deepcopy(network).float()


@contextlib.contextmanager
def _replacing_files(folder: str | Path):
    """Yield a temporary folder, then move its files to `folder` one by one, weights first and model_index.json last.

    Paths of this machine are taken out of the JSON files first. If the process is killed at any time, `folder` either
    loads or has no model_index.json yet.
    """
    new = Path(folder, ".saving")
    shutil.rmtree(new, ignore_errors=True)  # remove files that a killed process left
    yield new
    hide_paths(new)
    order = ["*/*.safetensors*", "*/*", "*.py", "model_index.json"]
    files = (path for pattern in order for path in sorted(new.glob(pattern)))
    for file in dict.fromkeys(files):
        target = folder / file.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(new)
