"""Build the network of a run: a diffusers UNet2DModel, or our classifier of noisy images."""

import contextlib
import inspect
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DModel
from torch import nn

from ..diffusion.scheduler import make_scheduler
from ..errors import UserError
from ..hub_requests import HUB_ERRORS, ask_hub, transfer_seconds
from ..sizes import read_size
from . import judge
from .base_model import BaseModel, unet_arguments
from .classes import Classes
from .classifier import NoisyClassifier


WIDE = 1024  # UNets with wider levels may not fit into the memory
WEIGHT_FILES = "**/diffusion_pytorch_model*"


def build_unet(
    config,
    channels: int,
    class_names: list[str] | None = None,
    saved: dict | None = None,
    base: BaseModel | None = None,
) -> UNet2DModel:
    """Build the UNet that the flags in `config` describe, with weights drawn from `config.seed`.

    Args:
        channels: number of channels of the images.
        class_names: the classes of the data. A class-conditional UNet has one embedding per class. With
            --label_dropout it has one more, the last, for "no class".
        saved: the config of the network in the checkpoint to resume, see `middle_norm_groups`.
        base: the model of --init_from. Only its architecture is used here; `copy_weights` copies its weights.

    Raises:
        UserError: if such a UNet2DModel cannot be built. The message says which flag to change.
    """
    embeddings = Classes.of_run(config, class_names).num_embeddings or None
    if config.augment_probability:
        embeddings = 2 * (embeddings or 1)  # see augmented.py
    needed = {
        "sample_size": sample_size(config),
        "in_channels": channels,
        "out_channels": output_channels(config, channels),
        "num_class_embeds": embeddings,
    }
    if config.model_config_name_or_path:
        kwargs = read_unet_config(config)
        for key, wanted in needed.items():
            if kwargs.get(key) not in (wanted, [wanted, wanted]):
                raise UserError(
                    f"--model_config_name_or_path {config.model_config_name_or_path!r} has {key} {kwargs.get(key)}, "
                    f"but this run needs {wanted}: change the config, --resolution, --variance_type or "
                    "--class_conditional."
                )
    elif base is not None:
        kwargs = unet_arguments(config, base, needed)
    else:
        kwargs = unet_kwargs(config, channels, saved) | {"num_class_embeds": embeddings}
    if max(kwargs.get("block_out_channels") or [0]) > WIDE:
        check_memory(kwargs)
    with building("UNet", config.seed):
        unet = UNet2DModel(**kwargs)
        initialize(unet)
    if config.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UserError(
                f"--enable_xformers_memory_efficient_attention cannot be used here ({str(error).splitlines()[0]}): "
                "leave it out (torch's own attention is as fast), or install xformers on a machine with a GPU."
            ) from error
    return unet


def check_memory(kwargs: dict):
    """Raise a UserError if the weights of a UNet2DModel with these arguments do not fit into the memory."""
    with building("UNet", 0), torch.device("meta"):
        size = 4 * sum(parameter.numel() for parameter in UNet2DModel(**kwargs).parameters())
    memory = psutil.virtual_memory().total
    if size > memory:
        raise UserError(
            f"the weights of this UNet need {size / 1e9:,.0f} GB, but this machine has {memory / 1e9:,.0f} GB of "
            "memory: give a smaller --base_channels or smaller --channel_mults."
        )


def sample_size(config) -> int | list[int]:
    """Return UNet2DModel's `sample_size` for --resolution: the side of a square, or [height, width]."""
    height, width = read_size(config.resolution)
    return height if height == width else [height, width]


def output_channels(config, channels: int) -> int:
    """Return how many output channels the UNet needs: `channels`, or twice as many if it also predicts a variance."""
    return channels * (2 if config.variance_type == "learned_range" else 1)


# More than 60 lines because every flag of the architecture stands on a separate line.
def unet_kwargs(config, channels: int, saved: dict | None = None) -> dict:
    """Return the UNet2DModel arguments for the flags in `config`, for images of `channels` channels.

    `saved` is the config of the network in the checkpoint to resume, see `middle_norm_groups`.

    Raises:
        UserError: if the resolution cannot be halved once per level, if no level has a requested attention
            resolution, if an attention head is wider than its level, or if --freq_shift is too large for the number
            of channels. The message names the flag to change.
    """
    sides = read_size(config.resolution)
    mults = default_channel_mults(sides) if config.channel_mults is None else config.channel_mults
    if not mults or min(mults) < 1:
        raise UserError(f"--channel_mults is {mults}, but needs one positive number per level, e.g. 1,2,2,2.")
    multiple = 2 ** (len(mults) - 1)
    if any(side % multiple for side in sides):
        of = "a resolution that is a multiple" if sides[0] == sides[1] else "sides that are multiples"
        raise UserError(
            f"--resolution {config.resolution} cannot be halved {len(mults) - 1} times, but the {len(mults)} levels "
            f"of --channel_mults {','.join(map(str, mults))} need that: give fewer levels, or {of} of {multiple}."
        )
    sizes = [min(sides) >> level for level in range(len(mults))]
    attention = sizes[-2:-1] if config.attention_resolutions is None else config.attention_resolutions
    if unknown := sorted(set(attention) - set(sizes)):
        raise UserError(
            f"--attention_resolutions has {unknown[0]}, but the levels of this UNet have sides of {sizes} "
            f"pixels{'' if sides[0] == sides[1] else ' (the shorter side of each level)'}: choose from these sizes."
        )
    base = 128 if config.base_channels is None else config.base_channels
    block_out_channels = [base * mult for mult in mults]
    if max(block_out_channels) > judge.MAX_CHANNELS:
        raise UserError(
            f"--base_channels {base} and --channel_mults {','.join(map(str, mults))} make a level of "
            f"{max(block_out_channels):,} channels, but at most {judge.MAX_CHANNELS:,} are possible: give smaller "
            "numbers."
        )
    attended = [size in attention for size in sizes]
    add_attention = config.attention_resolutions != []  # in the middle block
    widths = [width for width, a in zip(block_out_channels, attended) if a] + block_out_channels[-1:] * add_attention
    if widths and config.attention_head_dim > min(widths):
        raise UserError(
            f"--attention_head_dim is {config.attention_head_dim}, but a level with attention has only {min(widths)} "
            "channels: give a smaller number, or 0 for one head over all channels."
        )
    if config.freq_shift and base // 2 <= config.freq_shift:  # UNet2DModel divides by base // 2 - freq_shift
        raise UserError(
            f"--base_channels is {base}, but --freq_shift {config.freq_shift} needs at least "
            f"{2 * config.freq_shift + 2} channels: give more channels, or a smaller --freq_shift."
        )
    norm_num_groups = common_groups(config.norm_num_groups, block_out_channels)
    return dict(
        sample_size=sample_size(config),
        in_channels=channels,
        out_channels=output_channels(config, channels),
        layers_per_block=2 if config.layers_per_block is None else config.layers_per_block,
        block_out_channels=tuple(block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        add_attention=add_attention,
        attention_head_dim=config.attention_head_dim or None,
        dropout=0.0 if config.dropout is None else config.dropout,
        norm_num_groups=norm_num_groups,
        attn_norm_num_groups=middle_norm_groups(config, norm_num_groups, saved),
        norm_eps=config.norm_eps,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        downsample_padding=config.downsample_padding,
    )


def middle_norm_groups(config, norm_num_groups: int, saved: dict | None) -> int | None:
    """Return UNet2DModel's `attn_norm_num_groups`, the groups of the GroupNorm before the middle attention.

    If the result is None, diffusers leaves out this GroupNorm for scale_shift, and otherwise makes it with
    `norm_num_groups` groups. Nichol & Dhariwal's UNet always has it (improved-diffusion `unet.py: AttentionBlock`), so
    we request it for scale_shift. Earlier versions of this package did not. To resume one of their checkpoints, the
    network must be built without it. `saved` is the config of the network in the checkpoint to resume.
    """
    if config.resnet_time_scale_shift == "default":
        return None
    had_none = saved is not None and saved.get("attn_norm_num_groups") is None
    return None if had_none else norm_num_groups


def default_channel_mults(sides: tuple[int, int]) -> list[int]:
    """Return one channel multiplier per level: 1, 1, 2, 2, 4, 4, as in diffusers' example script.

    If the sides of the images cannot be halved five times, there are fewer levels. At 64 px and --base_channels 128,
    the six levels have 128, 128, 256, 256, 512 and 512 channels.
    """
    halvings = 0
    while halvings < 5 and all(side % 2 ** (halvings + 1) == 0 and side >> (halvings + 1) >= 2 for side in sides):
        halvings += 1
    return [1, 1, 2, 2, 4, 4][: halvings + 1]


def common_groups(groups: int, channel_counts: list[int]) -> int:
    """Return `groups`, halved (rounding down) until it divides all channel counts.

    For example, 32 becomes 4 for channel counts 12, 24 and 48.
    """
    while any(count % groups for count in channel_counts):
        groups //= 2
    return groups


def build_classifier(config, channels: int, class_names: list[str], saved: dict | None = None) -> NoisyClassifier:
    """Build a classifier of noisy images with the architecture flags of `config` and weights drawn from `config.seed`.

    The classifier is the downsampling half of the UNet that the same flags would build. `saved` is the config of the
    network in the checkpoint to resume, see `middle_norm_groups`.

    Raises:
        UserError: if such a UNet or classifier cannot be built. The message says which flag to change.
    """
    kwargs = unet_kwargs(config, channels, saved)
    with torch.device("cpu"):  # not on the meta device, which a caller may have set: its tensors have no values
        scheduler = make_scheduler(config.ddpm_beta_schedule, config.ddpm_num_steps)
        quarters = scheduler.quarters
    names = ["sample_size", "in_channels", "layers_per_block", "block_out_channels", "down_block_types", "dropout"]
    names += ["norm_num_groups", "attn_norm_num_groups", "attention_head_dim", "resnet_time_scale_shift"]
    names += ["add_attention"]
    with building("classifier", config.seed):
        return NoisyClassifier(
            num_classes=len(class_names),
            id2label=dict(enumerate(class_names)),
            num_train_timesteps=config.ddpm_num_steps,
            beta_schedule=scheduler.config.beta_schedule,
            quarters=quarters,
            **{name: kwargs[name] for name in names},
        )


@contextlib.contextmanager
def building(kind: str, seed: int):
    """For a `with` block that builds a network: seed torch's global generator, and turn errors into a UserError.

    After the block, the generator has its earlier state again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"this {kind} cannot be built ({error}): change the architecture flags.") from error


def unet_channels(config) -> int | None:
    """Return the number of channels of --model_config_name_or_path, or None without that flag.

    Raises:
        UserError: if the config cannot be read.
    """
    if config.model_config_name_or_path is None:
        return None
    return read_unet_config(config)["in_channels"]


def ignored_weights_warning(config) -> list[str]:
    """Return a list with one warning if --model_config_name_or_path names a model whose weights are ignored, else [].

    A Hub id always gives a warning, because this function does not ask the Hub whether the repository has weights.
    """
    name = config.model_config_name_or_path
    if name is None or (Path(name).exists() and not any(Path(name).glob(WEIGHT_FILES))):
        return []
    start = "" if config.init_from else f": to start from them, give --init_from {name}"
    return [f"Warning: --model_config_name_or_path {name} gives only its config, and its weights are ignored{start}."]


def read_unet_config(config) -> dict:
    """Return all UNet2DModel arguments for the config that --model_config_name_or_path names.

    The flag takes a JSON file, a folder or a Hub id.

    Raises:
        UserError: if there is no config, or if it is not the config of a UNet2DModel that can be trained here.
    """
    name = config.model_config_name_or_path
    subfolder = "unet" if (Path(name) / "unet" / "config.json").is_file() else None

    def load():
        return UNet2DModel.load_config(name, subfolder=subfolder, cache_dir=config.cache_dir)

    try:
        kwargs = load() if Path(name).exists() else ask_hub(load, transfer_seconds(0))
        if isinstance(kwargs, dict):
            judge.check_sizes(kwargs)
    except (ValueError, *HUB_ERRORS) as error:
        raise UserError(
            f"--model_config_name_or_path {name!r} has no UNet2DModel config ({str(error).strip().splitlines()[0]}): "
            "give a JSON file with such a config, or a folder or Hub id that has one."
        ) from error
    kind = kwargs.get("_class_name", "UNet2DModel") if isinstance(kwargs, dict) else "JSON of another shape"
    if kind != "UNet2DModel":
        raise UserError(f"--model_config_name_or_path {name!r} holds {kind}: give the config of a UNet2DModel.")
    if kwargs.get("class_embed_type"):
        raise UserError(
            f"--model_config_name_or_path {name!r} has class_embed_type {kwargs['class_embed_type']}, but only "
            "num_class_embeds is supported: give a config without class_embed_type."
        )
    # What the config leaves out is UNet2DModel's default.
    parameters = list(inspect.signature(UNet2DModel.__init__).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return defaults | {key: value for key, value in kwargs.items() if not key.startswith("_")}


@torch.no_grad()
def initialize(unet: UNet2DModel):
    """Initialize the weights as Ho et al. 2020 do (`nn.py: default_init`): Glorot-uniform weights and zero biases.

    The last layer of each residual block, the last layer of each attention block, and the last layer of the UNet are
    all zeros. At the start of training, no block therefore adds anything to its input, and the UNet predicts zero.
    Nichol & Dhariwal keep torch's default for all other layers. Here, every UNet is initialized as Ho's.
    """
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            nn.init.zeros_(module.weight)
