"""Convert models that `load_pretrained` refuses: pickles, UNets without a scheduler, checkpoints of other programs."""

import re
import tempfile
import warnings
from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DModel

from ..diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ..errors import UserError, no_such
from ..files import check_new_output, new_folder, read_json, write_json, writing
from . import judge
from .classes import Classes
from .openai import read_checkpoint
from .pretrained import (
    PIPELINE_FILES,
    WEIGHTS,
    check_is_ddpm,
    check_shards,
    find_folder,
    opening,
    part_folder,
    read_network,
    read_scheduler,
)
from .saving import save_classifier, save_pipeline


PICKLES = ["diffusion_pytorch_model*.bin", "unet/diffusion_pytorch_model*.bin"]
PICKLE = r"diffusion_pytorch_model(-\d+-of-\d+)?\.bin"  # one file or shards, no variant such as fp16
# The settings of diffusers' script, for a model without a scheduler.
SCHEDULE = {"ddpm_num_steps": 1000, "ddpm_beta_schedule": "linear", "prediction_type": "epsilon"}


def convert(name: str | Path, output: str | Path, *, weights: str = "published", **schedule):
    """Convert a model with pickled weights or without a scheduler to a stock pipeline with safetensors.

    Pickles are read with torch's `weights_only`, which runs no code. For checkpoints of OpenAI's programs see
    `convert_checkpoint`.

    Args:
        name: the folder or Hub id of a DDPM's pipeline or of a UNet2DModel, or a folder `checkpoint-<step>` of
            diffusers' train_unconditional.py.
        output: a folder that does not exist yet.
        weights: for a checkpoint of diffusers' script. "published" converts the moving average (unet_ema), or `unet`
            if there is no unet_ema. "raw" converts `unet`, the weights before averaging. Without a unet_ema, "raw" is
            an error.
        schedule: ddpm_num_steps, ddpm_beta_schedule and prediction_type, for a model without a scheduler. Default: the
            settings of diffusers' script, see SCHEDULE.

    Raises:
        UserError: if `name` is none of these, if the model cannot draw images, or if `output` exists or cannot be
            written.
    """
    output = check_new_output("OUTPUT", output)
    name, folder, _ = find_folder(name, [*PIPELINE_FILES, *PICKLES])
    has_index = (folder / "model_index.json").is_file()
    index = read_json(folder / "model_index.json") if has_index else {}
    if has_index:
        check_is_ddpm(name, index)
    unet_folder = _unet_folder(name, folder, weights)
    with opening(name, "give a whole pipeline or UNet of diffusers"):
        config = read_json(unet_folder / "config.json")
        if config.get("_class_name") != "UNet2DModel":
            raise ValueError(f"it is a {str(config.get('_class_name'))[:60]}, not a UNet2DModel")
        judge.check_index(index)
        judge.check_unet(config, index)
        if has_index and schedule:
            raise UserError(f"{name} has a scheduler of its own: leave --{min(schedule)} out.")
        scheduler = read_scheduler(folder) if has_index else _new_scheduler(schedule)
        judge.check_schedule(scheduler)
        unet = _read_unet(unet_folder, config)
        judge.check_together(unet.config, scheduler.config)
    names = Classes.of_model(unet.config.num_class_embeds, index.get("id2label")).names
    with writing("the pipeline", output), new_folder(output) as new:
        save_pipeline(new, unet, scheduler, names)


def convert_checkpoint(
    path: str | Path, output: str | Path, *, original: str | None = None, original_flags: str | None = None
):
    """Convert a checkpoint (.pt) of OpenAI's improved-diffusion or guided-diffusion to a stock pipeline.

    The new model computes the same function. If the old model has 4,000 timesteps and --rescale_timesteps, the new
    model has 1,000 timesteps: every fourth. A classifier becomes a folder that `load_classifier` reads.

    Args:
        output: a folder that does not exist yet.
        original: the program, improved-diffusion or guided-diffusion. May be None if the file has the name of a
            published checkpoint, such as cifar10_uncond_50M_500K.pt.
        original_flags: the flags of the training command, e.g. "--image_size 32 --learn_sigma True". May be None if
            the file has the name of a published checkpoint, because its flags are known.

    Raises:
        UserError: if stock diffusers cannot express the model exactly (the message names the layer), if the flags are
            missing or do not fit, or if `output` exists or cannot be written.

    Example:
        >>> convert_checkpoint("cifar10_uncond_50M_500K.pt", "ddpm-cifar10")
    """
    output, path = check_new_output("OUTPUT", output), Path(path)
    with opening(path, "give a complete checkpoint of improved-diffusion or guided-diffusion"):
        network, scheduler = read_checkpoint(path, original, original_flags)
        if isinstance(network, UNet2DModel):
            judge.check_unet(network.config)
        judge.check_schedule(scheduler)
    with writing("the model", output), new_folder(output) as new:
        if isinstance(network, UNet2DModel):
            save_pipeline(new, network, scheduler)
        else:
            save_classifier(new, network)


def _unet_folder(name: str, folder: Path, weights: str) -> Path:
    """Return the folder with the UNet to convert."""
    averaged = folder / "unet_ema"
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; choose {' or '.join(WEIGHTS)}.")
    if weights == "raw" and not averaged.is_dir():
        raise UserError(
            f"{name} has no unet_ema, so it is not known whether its weights are averages: leave --weights out."
        )
    found = averaged if weights == "published" and averaged.is_dir() else part_folder(folder, "unet")
    if not (found / "config.json").is_file():
        raise UserError(
            f"{name} has no config.json of a UNet: give a pipeline, a UNet, or a checkpoint of diffusers' script."
        )
    return found


def _new_scheduler(schedule: dict) -> PaperDDPMScheduler:
    """Return a scheduler for a UNet that has none."""
    T, beta_schedule, prediction_type = (SCHEDULE | schedule).values()
    if prediction_type not in judge.PREDICTION_TYPES:
        raise UserError(no_such("--prediction_type", prediction_type, judge.PREDICTION_TYPES))
    if not 1 <= T <= judge.MAX_T:
        raise UserError(f"--ddpm_num_steps is {T}, but must be from 1 to {judge.MAX_T:,}: give another number.")
    return make_scheduler(beta_schedule, T, prediction_type=prediction_type)


def _read_unet(folder: Path, config: dict) -> UNet2DModel:
    """Return the UNet in a folder. Pickled weights are first saved as safetensors, which diffusers then loads.

    diffusers also renames weights whose names an earlier version of it wrote.
    """
    check_shards(folder)
    if any(folder.glob("*.safetensors")):
        return read_network(UNet2DModel, folder)
    pickles = [path for path in sorted(folder.glob("*.bin")) if re.fullmatch(PICKLE, path.name)]
    if not pickles:
        raise ValueError("it has neither safetensors nor diffusion_pytorch_model.bin")
    tensors = {}
    for path in pickles:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the format of the file, which does not matter
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise ValueError(f"{path.name} holds other things than weights")
        tensors |= content
    with tempfile.TemporaryDirectory() as place:
        write_json(Path(place, "config.json"), config)
        # Clone, because safetensors does not store tensors that share memory.
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, Path(place, "diffusion_pytorch_model.safetensors"))
        return read_network(UNet2DModel, Path(place))
