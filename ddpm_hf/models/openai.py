"""Read checkpoints of OpenAI's improved-diffusion and guided-diffusion as networks of this package.

The two programs (https://github.com/openai/improved-diffusion and https://github.com/openai/guided-diffusion) save a
state dict without a config, so the flags of the training command are needed. A checkpoint is converted only if
UNet2DModel, or our NoisyClassifier, computes exactly the same function. docs/convert.md lists the differences.
"""

import re
import shlex
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ..errors import UserError, no_such
from . import judge
from .classifier import NoisyClassifier


# The flags that decide what a network computes, with the defaults of both programs (their script_util.py).
FLAGS = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "learn_sigma": False,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "predict_xstart": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
}
CLASSIFIER_FLAGS = {
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
GUIDED_FLAGS = {
    "num_head_channels": -1,
    "channel_mult": "",
    "resblock_updown": False,
    "use_new_attention_order": False,
    "rescale_timesteps": False,
}
PROGRAMS = {
    "improved-diffusion": FLAGS | {"sigma_small": False, "rescale_timesteps": True},
    "guided-diffusion": FLAGS | GUIDED_FLAGS | CLASSIFIER_FLAGS,
}
# Flags of the same commands that do not change what a trained network computes.
OTHER_FLAGS = ["lr", "batch_size", "microbatch", "use_kl", "schedule_sampler", "rescale_learned_sigmas", "use_fp16"]
OTHER_FLAGS += ["use_checkpoint", "timestep_respacing", "data_dir", "iterations", "anneal_lr", "weight_decay"]
OTHER_FLAGS += [
    "ema_rate",
    "log_interval",
    "save_interval",
    "resume_checkpoint",
    "fp16_scale_growth",
    "lr_anneal_steps",
]
OTHER_FLAGS += ["num_samples", "model_path", "use_ddim", "clip_denoised", "classifier_path", "classifier_scale"]
OTHER_FLAGS += ["classifier_use_fp16", "noised", "val_data_dir", "eval_interval", "base_samples"]
# The channels of each level as multiples of --num_channels. guided-diffusion also has the flag --channel_mult.
CHANNEL_MULTS = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
CHANNEL_MULTS |= {512: (0.5, 1, 1, 2, 2, 4, 4)}
COSINE = {"learn_sigma": True, "noise_schedule": "cosine"}
CIFAR10 = {"image_size": 32, "num_res_blocks": 3, "dropout": 0.3, "diffusion_steps": 4000, **COSINE}
IMAGENET64 = {"num_res_blocks": 3, "diffusion_steps": 4000, **COSINE}
LSUN = {"image_size": 256, "num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False}
LSUN |= {"attention_resolutions": "16", "rescale_timesteps": False}
ADM = {"num_channels": 256, "num_head_channels": 64, "attention_resolutions": "32,16,8", "resblock_updown": True}
ADM |= {"learn_sigma": True}
ADM64 = ADM | {"num_channels": 192, "num_res_blocks": 3, "dropout": 0.1, "use_new_attention_order": True, **COSINE}
ADM256 = ADM | {"image_size": 256}
# The flags of the published checkpoints, by their file names (from the README of each program).
PUBLISHED = {
    "improved-diffusion": {
        "cifar10_uncond_50M_500K.pt": CIFAR10,
        "cifar10_uncond_vlb_50M_500K.pt": CIFAR10,
        "imagenet64_uncond_100M_1500K.pt": IMAGENET64,
        "imagenet64_uncond_vlb_100M_1500K.pt": IMAGENET64,
        "imagenet64_cond_270M_250K.pt": IMAGENET64
        | {"num_channels": 192, "class_cond": True, "rescale_timesteps": False},
        "lsun_uncond_100M_1200K_bs128.pt": LSUN,
        "lsun_uncond_100M_2400K_bs64.pt": LSUN,
    },
    "guided-diffusion": {
        "64x64_diffusion.pt": ADM64 | {"class_cond": True},
        "128x128_diffusion.pt": ADM | {"image_size": 128, "num_head_channels": -1, "class_cond": True},
        "256x256_diffusion.pt": ADM256 | {"class_cond": True},
        "256x256_diffusion_uncond.pt": ADM256,
        "512x512_diffusion.pt": ADM | {"image_size": 512, "class_cond": True},
        "64x64_classifier.pt": {"image_size": 64, "classifier_depth": 4, "noise_schedule": "cosine"},
        "128x128_classifier.pt": {"image_size": 128},
        "256x256_classifier.pt": {"image_size": 256},
        "512x512_classifier.pt": {"image_size": 512},
        "lsun_bedroom.pt": ADM256 | {"dropout": 0.1},
        "lsun_cat.pt": ADM256 | {"dropout": 0.1},
        "lsun_horse.pt": ADM256 | {"dropout": 0.1},
        "lsun_horse_nodropout.pt": ADM256,
    },
}
SCHEDULES = {"linear": "ho_linear", "cosine": "nichol_cosine"}
# OpenAI's names of layers, with diffusers' names: in a residual block, in an attention block, and at the end of a
# classifier.
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
RESNET |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
POOLS = {"adaptive": {"out.3": "head"}, "attention": {"out.2": "head", "out.2.qkv_proj": "head.to_qkv"}}
POOLS["attention"] |= {"out.2.c_proj": "head.to_out"}
GROUPS = 32  # of every GroupNorm


def read_checkpoint(path: Path, program: str | None, text: str | None):
    """Return (network, scheduler) of a checkpoint. The network is a UNet2DModel or a NoisyClassifier, in float32.

    Args:
        program: "improved-diffusion" or "guided-diffusion".
        text: the flags of the training command, e.g. "--image_size 32 --learn_sigma True". Other flags have the
            defaults of `program`. Both arguments may be None for a file with the name of a published checkpoint.

    Raises:
        UserError: if a flag is missing, is unknown or does not fit the checkpoint, or if diffusers cannot express the
            network. The message names the layer.
        Exception: anything that torch raises for a broken file.
    """
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    try:
        _check_tensors(tensors)
        flags = _all_flags(path, program, text)
        is_classifier = not any(name.startswith("output_blocks.") for name in tensors)
        flags = _classifier_flags(flags) if is_classifier else flags
        scheduler = _scheduler(flags)
        widths, attended = _levels(flags)
        head_dim = _head_dim(flags, widths, attended)
        config = _config(flags, widths, attended, head_dim)
        names = _names(flags, attended, is_classifier)
        kind = NoisyClassifier if is_classifier else UNet2DModel
        if is_classifier:
            config = _classifier_config(flags, config, scheduler)
        return _network(kind, config, _converted(tensors, names, flags, head_dim), names), scheduler
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} cannot be converted: {error}.") from error


def _all_flags(path: Path, program: str | None, text: str | None) -> dict:
    """Return all flags with their values: those of `text` or of a published checkpoint, and defaults for the rest."""
    published = {name: (one, flags) for one, known in PUBLISHED.items() for name, flags in known.items()}
    if text is None and path.name in published and program in (None, published[path.name][0]):
        program, flags = published[path.name]
        return PROGRAMS[program] | flags
    if program is None or text is None:
        raise UserError(
            f"{path} does not say how its network is built: give --original improved-diffusion (or guided-diffusion) "
            'and --original_flags "--image_size 64 --num_channels 128 ...", the flags that it was trained with.'
        )
    if program not in PROGRAMS:
        raise UserError(no_such("--original", program, PROGRAMS))
    known = PROGRAMS[program]
    return known | {name: _value(name, value, known[name]) for name, value in _given(text, known) if name in known}


def _given(text: str, known: dict):
    """Yield the name and the value of each flag in a command line. Raise a UserError if they cannot be read."""
    try:
        words = shlex.split(text.replace("=", " "))
    except ValueError as error:
        raise UserError(f"--original_flags cannot be read ({error}): give it as one text in quotes.") from error
    for name, value in zip(words[::2], [*words[1::2], ""]):
        name = name.removeprefix("--")
        if name not in known and name not in OTHER_FLAGS:
            raise UserError(no_such("--original_flags", name, [*known, *OTHER_FLAGS]))
        if not value or value.startswith("--"):
            raise UserError(f"--original_flags has --{name} without a value: give a value after each flag.")
        yield name, value


def _value(name: str, text: str, default):
    """Return the value of a flag, with the type of its default."""
    if isinstance(default, bool):
        values = dict.fromkeys(["true", "yes", "t", "y", "1"], True)
        values |= dict.fromkeys(["false", "no", "f", "n", "0"], False)
        if text.lower() in values:
            return values[text.lower()]
    else:
        try:
            return type(default)(text)
        except ValueError:
            pass
    raise UserError(f"--original_flags has --{name} {text}: give a {type(default).__name__} such as {default}.")


def _check_tensors(tensors):
    """Raise a ValueError if this is not the state dict of a network that makes or classifies images."""
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError("it holds other things than weights: give ema_<rate>_<step>.pt or model<step>.pt")
    first = tensors.get("input_blocks.0.0.weight")
    if first is None or first.ndim != 4:
        raise ValueError("it has no convolution input_blocks.0.0: give a checkpoint of one of these programs")
    if first.shape[1] == 6:
        raise ValueError(
            "its input_blocks.0.0 takes 6 channels, so it enlarges images, and diffusers has no pixel-space "
            "pipeline that does this with a UNet2DModel: give a model that draws from noise"
        )


def _classifier_flags(flags: dict) -> dict:
    """Return the flags of a classifier, renamed to the corresponding flags of a UNet."""
    if "classifier_width" not in flags:
        raise ValueError("it has no output_blocks, so it is a classifier: give --original guided-diffusion")
    own = {name.removeprefix("classifier_"): flags[name] for name in CLASSIFIER_FLAGS}
    own |= {"num_channels": own["width"], "num_res_blocks": own["depth"], "num_head_channels": 64}
    fixed = {name: PROGRAMS["guided-diffusion"][name] for name in ("num_heads_upsample", "class_cond", "dropout")}
    return flags | own | fixed | {"use_new_attention_order": False, "channel_mult": "", "learn_sigma": False}


def _scheduler(flags: dict) -> PaperDDPMScheduler:
    """Return the scheduler of a model.

    With --rescale_timesteps, the network was trained with the timesteps 1000 t/T. diffusers gives it 0, 1, 2, ... So
    for T = 4000, the new scheduler has every 4th timestep of the old one, where 1000 t/T is 0, 1, ..., 999. The new
    betas keep abar at these timesteps (Nichol & Dhariwal 2021, eq. 19).
    """
    T, name = flags["diffusion_steps"], flags["noise_schedule"]
    if name not in SCHEDULES:
        raise ValueError(f"--noise_schedule is {name!r}: give {' or '.join(SCHEDULES)}")
    if not 21 <= T <= judge.MAX_T:
        raise ValueError(f"--diffusion_steps is {T}: give a number from 21 to {judge.MAX_T:,}")
    fixed = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    settings = {"prediction_type": "sample" if flags["predict_xstart"] else "epsilon"}
    settings["variance_type"] = "learned_range" if flags["learn_sigma"] else fixed
    scheduler = make_scheduler(SCHEDULES[name], T, **settings)
    if not flags["rescale_timesteps"] or T == 1000:
        return scheduler
    if T % 1000:
        raise ValueError(
            f"with --rescale_timesteps True, its time_embed.0 is given 1000 t/{T}, but diffusers gives a "
            "UNet2DModel the timesteps 0, 1, 2, ...: give a model whose --diffusion_steps is a multiple of 1000"
        )
    alpha_bar = scheduler.alphas_cumprod64[:: T // 1000]
    before = torch.nn.functional.pad(alpha_bar[:-1], (1, 0), value=1.0)
    config = {"num_train_timesteps": 1000, "trained_betas": (1 - alpha_bar / before).tolist()}
    return PaperDDPMScheduler(**config, beta_schedule=scheduler.config.beta_schedule, **settings)


def _levels(flags: dict) -> tuple[list[int], list[bool]]:
    """Return two lists: the channels of each level, and whether each level has attention."""
    size = flags["image_size"]
    try:
        mults = [int(mult) for mult in flags.get("channel_mult", "").split(",") if mult] or CHANNEL_MULTS[size]
        rates = [size // int(resolution) for resolution in flags["attention_resolutions"].split(",")]
    except (KeyError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"its levels do not follow from --image_size {size}, --channel_mult "
            f"{flags.get('channel_mult') or '(not given)'} and --attention_resolutions "
            f"{flags['attention_resolutions']}: give the flags of its training command"
        ) from None
    widths = [int(flags["num_channels"] * mult) for mult in mults]
    if widths[0] != flags["num_channels"]:
        raise ValueError(
            f"its time_embed.0 takes {flags['num_channels']} numbers and its input_blocks.0.0 gives {widths[0]} "
            "channels, but in a UNet2DModel these are equal: give a model of another size"
        )
    if not all(width >= GROUPS and width % GROUPS == 0 for width in widths):
        raise ValueError(
            f"--num_channels is {flags['num_channels']}, but must be a multiple of {GROUPS}: give the right one"
        )
    return widths, [2**level in rates for level in range(len(widths))]


def _head_dim(flags: dict, widths: list[int], attended: list[bool]) -> int | None:
    """Return the channels of each attention head, or None if each layer has one head over all its channels."""
    if flags.get("num_head_channels", -1) != -1:
        head_dim = flags["num_head_channels"]
        for width in [width for width, has_attention in zip(widths, attended) if has_attention] + widths[-1:]:
            if head_dim < 1 or width % head_dim:
                raise ValueError(
                    f"--num_head_channels is {head_dim}, which does not divide {width}: give the right one"
                )
        return head_dim
    heads, heads_up = flags["num_heads"], flags["num_heads_upsample"]
    step = flags["num_res_blocks"] + 1  # how many input blocks a level has
    layers = {f"input_blocks.{step * level + 1}.1": w for level, w in enumerate(widths) if attended[level]}
    layers["middle_block.1"] = widths[-1]
    if heads_up not in (-1, heads) and any(attended):
        first = f"output_blocks.{step * attended[::-1].index(True)}.1"
        raise ValueError(
            f"its {first} has {heads_up} attention heads and {next(iter(layers))} has {heads}, but a UNet2DModel has "
            "the same number on the way up: give a model without --num_heads_upsample"
        )
    for name, width in layers.items():
        if heads < 1 or width % heads:
            raise ValueError(
                f"--num_heads is {heads}, which does not divide the {width} channels of {name}: give the right one"
            )
    if heads == 1:
        return None
    (first, head_dim), *others = [(name, width // heads) for name, width in layers.items()]
    for name, other in others:
        if other != head_dim:
            raise ValueError(
                f"its {first} has {heads} attention heads of {head_dim} channels and its {name} has {heads} of "
                f"{other}, but all heads of a UNet2DModel have the same width: give a model whose heads do"
            )
    return head_dim


def _config(flags: dict, widths: list[int], attended: list[bool], head_dim: int | None) -> dict:
    """Return the arguments of UNet2DModel."""
    is_resnet = flags.get("resblock_updown", False)  # down- and upsampling are residual blocks, not convolutions
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if is_resnet else ("DownBlock2D", "UpBlock2D")
    return {
        "sample_size": flags["image_size"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "layers_per_block": flags["num_res_blocks"],
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if each else plain[0] for each in attended],
        "up_block_types": ["AttnUpBlock2D" if each else plain[1] for each in reversed(attended)],
        "downsample_type": "resnet" if is_resnet else "conv",
        "upsample_type": "resnet" if is_resnet else "conv",
        "dropout": flags["dropout"],
        "attention_head_dim": head_dim,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "num_class_embeds": 1000 if flags["class_cond"] else None,
    }


def _classifier_config(flags: dict, config: dict, scheduler: PaperDDPMScheduler) -> dict:
    """Return the arguments of NoisyClassifier. `config` holds those of a UNet2DModel with the same flags."""
    if flags["pool"] not in ("adaptive", "attention"):
        raise ValueError(
            f"its out layers pool the features of all levels (--classifier_pool {flags['pool']}), which "
            "NoisyClassifier does not: give a classifier with adaptive or attention pooling"
        )
    unet_only = ("out_channels", "up_block_types", "upsample_type", "num_class_embeds")
    return {name: value for name, value in config.items() if name not in unet_only} | {
        "num_classes": 1000,
        "pool": "mean" if flags["pool"] == "adaptive" else "attention",
        "num_train_timesteps": len(scheduler),
        "beta_schedule": scheduler.config.beta_schedule,
    }


def _names(flags: dict, attended: list[bool], is_classifier: bool) -> dict[str, str]:
    """Return a dict from the names of layers in the checkpoint to their names in our network."""
    is_resnet, layers, last = flags.get("resblock_updown", False), flags["num_res_blocks"], len(attended) - 1
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb": "class_embedding", "input_blocks.0.0": "conv_in"}

    def add(source: str, target: str, parts: dict):
        names.update({f"{source}.{part}": f"{target}.{name}" for part, name in parts.items()})

    block = 1
    for level, has_attention in enumerate(attended):
        for layer in range(layers):
            add(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            if has_attention:
                add(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", ATTENTION)
            block += 1
        if level < last:
            add(
                f"input_blocks.{block}.0",
                f"down_blocks.{level}.downsamplers.0",
                RESNET if is_resnet else {"op": "conv"},
            )
            block += 1
    for part, target in enumerate(["resnets.0", "attentions.0", "resnets.1"]):
        add(f"middle_block.{part}", f"mid_block.{target}", ATTENTION if part == 1 else RESNET)
    if is_classifier:
        return names | {"out.0": "norm_out"} | POOLS.get(flags["pool"], {})
    for level, has_attention in enumerate(reversed(attended)):
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            add(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}", RESNET)
            if has_attention:
                add(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}", ATTENTION)
        if level < last:
            source = f"output_blocks.{block}.{1 + has_attention}"
            add(source, f"up_blocks.{level}.upsamplers.0", RESNET if is_resnet else {"conv": "conv"})
    return names | {"out.0": "conv_norm_out", "out.2": "conv_out"}


def _converted(
    tensors: dict, names: dict[str, str], flags: dict, head_dim: int | None
) -> dict[str, tuple[str, Tensor]]:
    """Return a dict from the names of tensors in our network to pairs (name in the checkpoint, tensor)."""
    converted = {}
    for full_name, tensor in tensors.items():
        layer, _, parameter = full_name.rpartition(".")
        if layer not in names:
            raise ValueError(f"its {full_name} has no place in the network of these flags: give the right flags")
        target = names[layer]
        if target.endswith(".qkv"):
            parts = _split_qkv(full_name, tensor.float(), flags, head_dim)
            target = target.removesuffix("qkv")
            converted |= {f"{target}to_{one}.{parameter}": (full_name, part) for one, part in zip("qkv", parts)}
        elif parameter == "positional_embedding":
            converted[f"{target}.positions"] = (full_name, tensor.float().T)
        else:
            is_linear = target.endswith(("to_out.0", "head", "head.to_qkv", "head.to_out"))  # a convolution of size 1
            flat = tensor.flatten(1) if is_linear and parameter == "weight" else tensor
            converted[f"{target}.{parameter}"] = (full_name, flat.float())
    return converted


def _split_qkv(name: str, tensor: Tensor, flags: dict, head_dim: int | None) -> Tensor:
    """Return q, k and v of an attention layer of C channels, shape (3, C, C) for weights or (3, C) for biases.

    The 3C rows of `tensor` are ordered by head, then by q, k, v. With --use_new_attention_order they are ordered by q,
    k, v, then by head, as in diffusers.
    """
    tensor = tensor.flatten(1) if tensor.ndim == 3 else tensor  # the weight of a convolution of size 1
    width = len(tensor) // 3
    if len(tensor) % 3 or width % (head_dim or width):
        raise ValueError(
            f"its {name} has {len(tensor)} rows, not 3 times a multiple of {head_dim or 1}: give the right flags"
        )
    heads = 1 if flags.get("use_new_attention_order") else width // (head_dim or width)
    rows = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(3, width, *tensor.shape[1:])


def _network(kind: type, config: dict, tensors: dict[str, tuple[str, Tensor]], names: dict[str, str]):
    """Return a network with these tensors. Raise a ValueError if they are not exactly the weights of the network."""
    judge.check_sizes(config)
    with judge.quiet_diffusers(), torch.device("meta"):
        network = kind(**config)
    layers = {target: source for source, target in names.items()}
    for name, expected in network.state_dict().items():
        if name not in tensors:
            layer, _, parameter = re.sub(r"\.to_[qkv]\b", ".qkv", name).rpartition(".")
            raise ValueError(f"it lacks {layers[layer]}.{parameter}: give the right flags")
        source, tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"its {source} makes a {name} of shape {tuple(tensor.shape)}, but these flags give "
                f"{tuple(expected.shape)}: give the right flags"
            )
    if extra := [source for name, (source, _) in tensors.items() if name not in network.state_dict()]:
        raise ValueError(f"its {extra[0]} has no place in the network of these flags: give the right flags")
    network.load_state_dict({name: tensor for name, (_, tensor) in tensors.items()}, assign=True)
    judge.check_weights(network)
    return network.eval()
