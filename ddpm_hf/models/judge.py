"""Check the configs of a model from elsewhere before its weights are read.

This file needs only torch and diffusers, because the Space has a copy of it. Its functions raise ValueErrors that name
the wrong entry. The caller adds the name of the model, and advice.
"""

import contextlib
import functools
import json
import math

import diffusers
import torch
from diffusers import UNet2DModel


# Limits on the numbers that determine time and memory. The largest published DDPMs stay far below them.
MAX_SIDE = 2048  # pixels
MAX_LAYERS = 32
MAX_LEVELS = 12
MAX_CHANNELS = 16_384
MAX_CLASSES = 1_000_000
MAX_T = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# None stands for null, which is the variance_type of DPM-Solver. DDIM's config has no variance_type.
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", None)


@contextlib.contextmanager
def quiet_diffusers():
    """During a `with` block, silence the log of diffusers. Its exceptions give the same reasons."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def check_index(index: dict):
    """Raise a ValueError if model_index.json has an `id2label` that does not name the classes 0, 1, 2, ..."""
    labels = index.get("id2label")
    if labels is None:
        return
    is_named = isinstance(labels, dict) and all(isinstance(name, str) for name in labels.values())
    if not is_named or sorted(map(str, labels)) != sorted(map(str, range(len(labels)))):
        raise ValueError('the id2label of its model_index.json is not like {"0": "cat", "1": "dog"}')


def check_unet(config: dict, index: dict | None = None):
    """Raise a ValueError if a UNet2DModel with this config cannot be built or cannot draw images.

    The UNet is built and called once on torch's meta device, where tensors have shapes but need no memory. This finds
    parts that do not fit together, whatever the size of the UNet.

    Args:
        index: the content of model_index.json, whose class names must fit the UNet.
    """
    check_sizes(config)
    size = config.get("sample_size")
    if size is None:
        raise ValueError("its unet/config.json has no sample_size: add it, the height and width of the images")
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not _is_whole(height, 1, MAX_SIDE) or not _is_whole(width, 1, MAX_SIDE):
        raise ValueError(
            f"its sample_size is {_short(size)}, but must be one or two whole numbers from 1 to {MAX_SIDE}"
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"its class_embed_type is {_short(config['class_embed_type'])}, but only classes by number, "
            "num_class_embeds, are supported"
        )
    labels = (index or {}).get("id2label")
    embeddings = config.get("num_class_embeds")
    if labels and embeddings and embeddings - len(labels) not in (0, 1):
        raise ValueError(
            f"it names {len(labels)} classes, but its num_class_embeds is {embeddings}, and must be the number of "
            'classes, or one more with "no class"'
        )
    channels = config.get("in_channels", 3)
    try:
        output_shape = _output_shape(json.dumps(config), channels, height, width)
    except Exception as error:  # diffusers checks little, so a bad config may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"its UNet config describes a UNet2DModel that cannot be built or cannot draw images ({reason})"
        ) from error
    if output_shape[2:] != (height, width):
        raise ValueError(f"its UNet turns {height}x{width} pixels into {output_shape[2]}x{output_shape[3]}")
    if output_shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"its UNet has {channels} channels in and {output_shape[1]} out, but the same number or twice as many (to "
            "predict a variance) are needed"
        )


@functools.lru_cache(maxsize=64)
def _output_shape(config: str, channels: int, height: int, width: int) -> torch.Size:
    """Return the shape of a UNet2DModel's output for one image of this shape. `config` is its config as JSON text."""
    with quiet_diffusers(), torch.device("meta"), torch.no_grad():
        unet = UNet2DModel.from_config(json.loads(config))
        classes = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
        return unet(torch.empty(1, channels, height, width), torch.zeros(1, dtype=torch.long), classes).sample.shape


def check_sizes(config: dict):
    """Raise a ValueError if a number in a network's config is out of range. This limits time and memory."""
    widths = config.get("block_out_channels", [224])
    is_list = isinstance(widths, (list, tuple)) and 1 <= len(widths) <= MAX_LEVELS
    if not is_list or not all(_is_whole(width, 1, MAX_CHANNELS) for width in widths):
        raise ValueError(
            f"its block_out_channels is {_short(widths)}, but must be 1 to {MAX_LEVELS} whole numbers up to "
            f"{MAX_CHANNELS:,}"
        )
    most = {"in_channels": MAX_CHANNELS, "out_channels": MAX_CHANNELS, "layers_per_block": MAX_LAYERS}
    may_be_null = {
        "num_class_embeds": MAX_CLASSES,
        "attention_head_dim": MAX_CHANNELS,
        "norm_num_groups": MAX_CHANNELS,
    }
    may_be_null |= {"time_embedding_dim": 4 * MAX_CHANNELS, "num_classes": MAX_CLASSES, "num_train_timesteps": MAX_T}
    may_be_null |= {"attn_norm_num_groups": MAX_CHANNELS}
    for name, high in {**most, **may_be_null}.items():
        value = config.get(name, 1)
        if not _is_whole(value, 1, high) and not (value is None and name in may_be_null):
            raise ValueError(f"its {name} is {_short(value)}, but must be a whole number from 1 to {high:,}")
    quarters = config.get("quarters")  # of a classifier
    if quarters is not None and not (
        isinstance(quarters, (list, tuple)) and len(quarters) == 3 and all(_is_number(one, 0, 1) for one in quarters)
    ):
        raise ValueError(f"its quarters is {_short(quarters)}, but must be three numbers from 0 to 1")
    for name, low in {"norm_eps": 0, "mid_block_scale_factor": 1e-6, "dropout": 0, "downsample_padding": 0}.items():
        if not _is_number(config.get(name, low), low, 1000):
            raise ValueError(f"its {name} is {_short(config[name])}, but must be a number of at least {low}")


def build_unet(config: dict, tensors: dict[str, torch.Tensor]) -> UNet2DModel:
    """Build the UNet of a config, with random weights. Raise a ValueError if `tensors` have other shapes."""
    with quiet_diffusers():
        with torch.device("meta"):
            shapes = {name: each.shape for name, each in UNet2DModel.from_config(config).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError("its weights are not those of a UNet with its config")
        return UNet2DModel.from_config(config)


def check_scheduler(config: dict):
    """Raise a ValueError if a scheduler's config has an entry that is not allowed."""
    T = config.get("num_train_timesteps", 1000)
    if not _is_whole(T, 1, MAX_T):
        raise ValueError(f"its num_train_timesteps is {_short(T)}, but must be a whole number from 1 to {MAX_T:,}")
    for name, known in {
        "beta_schedule": BETA_SCHEDULES,
        "prediction_type": PREDICTION_TYPES,
        "variance_type": VARIANCE_TYPES,
    }.items():
        if config.get(name, known[0]) not in known:
            listed = ", ".join(str(one) for one in known if one is not None)
            raise ValueError(f"its {name} is {_short(config[name])}, which is none of {listed}")
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, (list, tuple)) and len(betas) == T and all(_is_number(beta, 0, 1) for beta in betas)
    ):
        raise ValueError(f"its trained_betas are not {T} numbers from 0 to 1, one for each timestep")
    for name, (low, high) in {
        "beta_start": (0, 1),
        "beta_end": (0, 1),
        "dynamic_thresholding_ratio": (0, 1),
        "clip_sample_range": (0, math.inf),
        "sample_max_value": (0, math.inf),
    }.items():
        if not _is_number(config.get(name, low), low, high):
            raise ValueError(f"its {name} is {_short(config[name])}, but must be a number from {low} to {high}")
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if not isinstance(config.get(name, False), bool):
            raise ValueError(f"its {name} is {_short(config[name])}, but must be true or false")


def check_schedule(scheduler):
    """Raise a ValueError if a noise schedule is not finite, or if sampling with it would divide by 0."""
    signal = scheduler.alphas_cumprod
    if not (signal.isfinite().all() and signal[0] < 1 and (signal[:-1] > 0).all() and signal[-1] >= 0):
        raise ValueError(
            "its noise schedule adds no noise at first, leaves no signal before the end, or is not finite"
        )
    if signal[-1] == 0 and scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            "its noise schedule leaves no signal at the end, so the predicted noise (prediction_type epsilon) says "
            "nothing about the image there"
        )


def check_together(unet_config, scheduler_config):
    """Raise a ValueError if the scheduler needs timesteps or a variance that the UNet does not have."""
    is_learned = scheduler_config.get("variance_type") == "learned_range"
    if is_learned and unet_config["out_channels"] != 2 * unet_config["in_channels"]:
        raise ValueError("its variance_type is learned_range, but its UNet has no output channels for a variance")
    is_short = (unet_config.get("num_train_timesteps") or 0) < scheduler_config["num_train_timesteps"]
    if unet_config.get("time_embedding_type") == "learned" and is_short:
        raise ValueError("its UNet has learned fewer timesteps than its scheduler has")


def check_weights(network: torch.nn.Module):
    """Raise a ValueError if a weight of a network is not finite."""
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"its weights {name} are not all finite numbers, so its training diverged")


def _is_whole(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # True and 2.0 are not whole numbers in a config


def _is_number(value, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def _short(value) -> str:
    return repr(value)[:60]
