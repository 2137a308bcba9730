"""The network of a run and the moving average of its weights: diffusers' UNet2DModel, torch's AveragedModel."""

import contextlib
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from ..config.presets import PRESETS
from ..diffusion.scheduler import make_scheduler
from ..errors import UserError
from .classifier import NoisyClassifier


def build_unet(config, channels: int, class_names: list[str] | None = None) -> UNet2DModel:
    """Build the UNet that `config` asks for, with weights drawn from `config.seed`.

    Args:
        channels: of the images; the UNet must take as many.
        class_names: of the data. A conditional UNet has an embedding for each, and with --label_dropout one more, the
            last, for images of no class.

    Raises:
        UserError: if no UNet2DModel can be built so, saying which flag to change.
    """
    embeddings = len(class_names) + (config.label_dropout > 0) if config.class_conditional else None
    if config.model_config_name_or_path:
        kwargs = read_unet_config(config)
        outputs = channels * (2 if config.variance_type == "learned_range" else 1)
        fixed = dict(sample_size=config.resolution, in_channels=channels, out_channels=outputs)
        for key, wanted in (fixed | {"num_class_embeds": embeddings}).items():
            if kwargs.get(key) not in (wanted, [wanted, wanted]):
                raise UserError(
                    f"--model_config_name_or_path {config.model_config_name_or_path!r} has {key} {kwargs.get(key)}, "
                    f"but this run needs {wanted}: change --resolution, --variance_type, --class_conditional or it."
                )
    else:
        kwargs = unet_kwargs(config, channels) | {"num_class_embeds": embeddings}
    with seeded(config.seed):
        try:
            unet = UNet2DModel(**kwargs)
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"diffusers cannot build this UNet ({error}): change the architecture flags.") from error
        initialise(unet)
    if config.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UserError(
                f"--enable_xformers_memory_efficient_attention cannot act here ({str(error).splitlines()[0]}): "
                "install xformers on a machine with a GPU, or leave the flag out; torch's own attention is as fast."
            ) from error
    return unet


def unet_kwargs(config, channels: int) -> dict:
    """Return the arguments of the UNet2DModel that `config` asks for, for images of `channels` channels.

    What neither preset nor flags say fits the data: upstream's six levels at 64 px (128, 128, 256, 256, 512, 512
    channels, attention one level above the lowest), and as many of them as another resolution can be halved to.

    Raises:
        UserError: if the resolution cannot be halved once per level, or attention is asked for at a size no level has.
    """
    resolution = config.resolution
    mults = config.channel_mults
    if mults is None:
        halvings = 0
        while halvings < 5 and resolution % 2 ** (halvings + 1) == 0 and resolution >> (halvings + 1) >= 2:
            halvings += 1
        mults = [1, 1, 2, 2, 4, 4][: halvings + 1]
    if not mults or min(mults) < 1:
        raise UserError(f"--channel_mults is {mults}, but needs one positive number per level, e.g. 1,2,2,2.")
    if resolution % 2 ** (len(mults) - 1):
        raise UserError(
            f"--resolution {resolution} cannot be halved {len(mults) - 1} times, as the {len(mults)} levels of "
            f"--channel_mults {','.join(map(str, mults))} need: give fewer levels, or a multiple of "
            f"{2 ** (len(mults) - 1)}."
        )
    sizes = [resolution >> level for level in range(len(mults))]
    attention = config.attention_resolutions
    if attention is None:
        attention = sizes[-2:-1]
    if unknown := sorted(set(attention) - set(sizes)):
        raise UserError(
            f"--attention_resolutions has {unknown[0]}, but the levels of this UNet are {sizes} pixels wide: "
            "choose from these."
        )
    base = 128 if config.base_channels is None else config.base_channels
    block_out_channels = [base * mult for mult in mults]
    attended = [size in attention for size in sizes]
    kwargs = dict(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels * (2 if config.variance_type == "learned_range" else 1),
        layers_per_block=2 if config.layers_per_block is None else config.layers_per_block,
        block_out_channels=tuple(block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        add_attention=config.attention_resolutions != [],
        dropout=0.0 if config.dropout is None else config.dropout,
        # 32 groups as everywhere; fewer only where tiny channel counts leave no choice.
        norm_num_groups=max(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 for c in block_out_channels)),
    )
    if config.preset is not None:
        kwargs |= PRESETS[config.preset].unet
    return kwargs


def build_classifier(config, channels: int, class_names: list[str]) -> NoisyClassifier:
    """Build the classifier of noisy images: the downsampling half of the UNet that `config` asks for, seeded alike.

    Raises:
        UserError: if no such UNet can be, saying which flag to change.
    """
    kwargs, scheduler = unet_kwargs(config, channels), make_scheduler(config.ddpm_beta_schedule, config.ddpm_num_steps)
    names = ["sample_size", "in_channels", "layers_per_block", "block_out_channels", "down_block_types", "dropout"]
    names += ["norm_num_groups", "attention_head_dim", "resnet_time_scale_shift", "add_attention"]
    with seeded(config.seed):
        try:
            return NoisyClassifier(
                num_classes=len(class_names),
                id2label=dict(enumerate(class_names)),
                num_train_timesteps=config.ddpm_num_steps,
                beta_schedule=scheduler.config.beta_schedule,
                **{name: kwargs[name] for name in names if name in kwargs},
            )
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"this classifier cannot be ({error}): change the architecture flags.") from error


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the global generator, which networks draw their weights from, for a while: the caller's is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def unet_channels(config) -> int | None:
    """Return the channels that images must be converted to for the given UNet config, or None: those of the data.

    Raises:
        UserError: if the config takes neither grey (1) nor RGB (3) images.
    """
    if config.model_config_name_or_path is None:
        return None
    channels = read_unet_config(config).get("in_channels", 3)
    if channels not in (1, 3):
        raise UserError(
            f"--model_config_name_or_path {config.model_config_name_or_path!r} has in_channels {channels}, but images "
            "have 1 (grey) or 3 (RGB): change the config."
        )
    return channels


def read_unet_config(config) -> dict:
    """Return the UNet2DModel arguments of --model_config_name_or_path: a JSON file, a folder or a Hub id.

    Raises:
        UserError: if there is no such config.
    """
    name = config.model_config_name_or_path
    subfolder = "unet" if (Path(name) / "unet" / "config.json").is_file() else None
    try:
        kwargs = UNet2DModel.load_config(name, subfolder=subfolder, cache_dir=config.cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_config_name_or_path {name!r} has no UNet2DModel config ({str(error).strip().splitlines()[0]}): "
            "give a JSON file, a folder or a Hub id that has one."
        ) from error
    kind = kwargs.get("_class_name", "UNet2DModel") if isinstance(kwargs, dict) else "JSON of another shape"
    if kind != "UNet2DModel":
        raise UserError(f"--model_config_name_or_path {name!r} is a {kind}: give the config of a UNet2DModel.")
    if kwargs.get("class_embed_type"):
        raise UserError(
            f"--model_config_name_or_path {name!r} has class_embed_type {kwargs['class_embed_type']}: give one with "
            "num_class_embeds alone."
        )
    return {key: value for key, value in kwargs.items() if not key.startswith("_")}


@torch.no_grad()
def initialise(unet: UNet2DModel):
    """Initialise as Ho et al. (`nn.py: default_init`): Glorot-uniform weights, zero biases, zeros where a branch ends.

    Each residual block, each attention and the UNet itself then begin as what their shortcut passes on, which is
    zero noise predicted for the whole.
    """
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            nn.init.zeros_(module.weight)
