"""A network on disk: stock diffusers' `DDPMPipeline`, or the files of a classifier; a kill leaves a folder that loads.

What is saved names diffusers' own classes only, so that it loads where ddpm_hf is not installed. Stock diffusers has
no class-conditional pipeline, so we save our own pipeline file next to the weights.
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


def save_pipeline(
    folder: str | Path, unet, scheduler, class_names: list[str] | None = None, pipeline: str | None = None
):
    """Save the UNet (float32 safetensors) and the scheduler as stock diffusers' `DDPMPipeline`, over an older one.

    The names of a conditional UNet's classes go into model_index.json as `id2label`, as DiTPipeline has them, and
    class_guided.py is saved beside it, for `DiffusionPipeline.from_pretrained(folder, custom_pipeline="class_guided",
    trust_remote_code=True)`. Other files in the folder, and the model, stay.

    Args:
        pipeline: a pipeline file of ours that is to be saved too and named by the index, so that no `custom_pipeline`
            is needed. (It would not help either: where an index names a file, diffusers 0.42 disregards any other
            file's path that is given, though not the name of one in the folder.)
    """
    conditional = unet.config.num_class_embeds is not None
    with saving(folder) as new:
        # Trailing, as our own samplers: stock DDIM then begins in pure noise, and draws what was scored.
        published = DDPMScheduler.from_config(scheduler.stock().config, timestep_spacing="trailing")
        DDPMPipeline(in_float32(unet), published).save_pretrained(new)
        index = read_json(new / "model_index.json")
        if class_names is not None:
            index["id2label"] = dict(enumerate(class_names))
        for name in {pipeline, "class_guided" if conditional else None} - {None}:
            shutil.copyfile(pipeline_file(name), new / f"{name}.py")
        if pipeline is not None:
            code = pipeline_file(pipeline).read_text(encoding="utf-8")
            index["_class_name"] = [pipeline, re.search(r"^class (\w+)\(DiffusionPipeline\)", code, re.MULTILINE)[1]]
        write_json(new / "model_index.json", index)


def save_classifier(folder: str | Path, classifier):
    """Save a classifier of noisy images (float32 safetensors) and its code in `folder`/classifier."""
    with saving(folder) as new:
        in_float32(classifier).save_pretrained(new / "classifier")


def in_float32(network):
    return network if network.dtype == torch.float32 else copy.deepcopy(network).float()


@contextlib.contextmanager
def saving(folder: str | Path):
    """Lend a folder to write to, then move its files to `folder` one by one, weights first and model_index.json last.

    A kill at any time leaves a folder that loads, or one with no index yet.
    """
    new = Path(folder, ".saving")
    shutil.rmtree(new, ignore_errors=True)  # left by a kill
    yield new
    order = ["*/*.safetensors*", "*/*", "*.py", "model_index.json"]
    files = (path for pattern in order for path in sorted(new.glob(pattern)))
    for part in dict.fromkeys(files):
        target = folder / part.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(part, target)
    shutil.rmtree(new)
