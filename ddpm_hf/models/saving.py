"""Save a network: as stock diffusers' `DDPMPipeline`, or as a classifier with its code.

The saved index names diffusers' own classes only, so that the folder loads where ddpm_hf is not installed. Stock
diffusers has no class-conditional pipeline, so we save our own pipeline file next to the weights.
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
    """Save the UNet (float32 safetensors) and the scheduler as stock diffusers' `DDPMPipeline`, over an older one.

    `class_names` are written to model_index.json as `id2label`, as for DiTPipeline. A conditional UNet also gets
    class_guided.py next to it, for `DiffusionPipeline.from_pretrained(folder, custom_pipeline="class_guided",
    trust_remote_code=True)`. Other files in the folder stay, and `unet` is not changed.

    Args:
        pipeline: the name of one of our pipelines. Its file is saved too, and the index names it, so that loading
            needs no `custom_pipeline`. (diffusers 0.42 then ignores a `custom_pipeline` that is the path of a file
            elsewhere.)
    """
    conditional = unet.config.num_class_embeds is not None
    with _replacing_files(folder) as new:
        # Save trailing spacing, as our own samplers use, so that stock DDIM begins in pure noise and draws the images
        # that were scored.
        published = DDPMScheduler.from_config(scheduler.stock().config, timestep_spacing="trailing")
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


def save_classifier(folder: str | Path, classifier):
    """Save a classifier of noisy images (float32 safetensors) and its code in `folder`/classifier."""
    with _replacing_files(folder) as new:
        _in_float32(classifier).save_pretrained(new / "classifier")


def _in_float32(network):
    """Return the network, or a float32 copy of it if it has another dtype."""
    return network if network.dtype == torch.float32 else copy.deepcopy(network).float()


@contextlib.contextmanager
def _replacing_files(folder: str | Path):
    """Yield a temporary folder, then move its files to `folder` one by one, weights first and model_index.json last.

    Paths of this machine are taken out of the JSON files first. After a kill at any time, `folder` loads or has no
    index yet.
    """
    new = Path(folder, ".saving")
    shutil.rmtree(new, ignore_errors=True)  # remove what an earlier kill left
    yield new
    hide_paths(new)
    order = ["*/*.safetensors*", "*/*", "*.py", "model_index.json"]
    files = (path for pattern in order for path in sorted(new.glob(pattern)))
    for file in dict.fromkeys(files):
        target = folder / file.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(new)
