"""Draw images from noise: ancestral DDPM sampling, DDIM and DPM-Solver++, over any subsequence of the timesteps.

A sampler is a function that computes one step. `SAMPLERS` lists the samplers. Image k takes all its noise from
`torch.Generator().manual_seed(seed + k)`, in the same order as in stock pipelines. So image k is the same for every
batch size and number of processes, and `DDPMPipeline(...)(generator=torch.Generator().manual_seed(seed + k))` draws it
too. Only round-off of 1e-5 remains, for pixels in [-1, 1]. It occasionally changes an 8-bit pixel by one grey level.
On NVIDIA GPUs, torch computes float32 convolutions in TF32 by default, which rounds to 10 bits, so the difference to a
CPU is larger there.
"""

import contextlib
import functools
import hashlib
import inspect
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.scheduler import PaperDDPMScheduler
from ..errors import UserError, no_such, whole_number


@dataclass
class Step:
    """The input of a sampler for one step from x_t to x_t'. Tensors are float32 (B, C, H, W).

    The network is evaluated once in each step. Methods of higher order can use the previous step, see dpmsolver_step.

    Attributes:
        timestep: t.
        prev_timestep: t', the timestep that the step leads to. It is -1 for the clean image.
        sample: x_t.
        pred_original_sample: the predicted x_0, clipped or thresholded as the scheduler's config says.
        pred_epsilon: the predicted noise, which clipping does not change (as in stock diffusers).
        predicted_variance: the second half of the output channels of a UNet that learns a variance; else None.
        previous: the step before this one, with its own `previous` set to None. None for the first step.

    Example:
        >>> def faded(scheduler, step, *, contrast=1.0):  # DDIM with less contrast
        ...     alpha_bar = float(scheduler.alphas_cumprod_at(step.prev_timestep))
        ...     image = contrast * step.pred_original_sample
        ...     return alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * step.pred_epsilon, None
        >>> ddpm_hf.SAMPLERS["faded"] = faded
        >>> len(ddpm_hf.sample("runs/digits", 2, "faded", num_inference_steps=5, contrast=0.5))
        2
    """

    timestep: int
    prev_timestep: int
    sample: Tensor
    pred_original_sample: Tensor
    pred_epsilon: Tensor
    predicted_variance: Tensor | None
    previous: "Step | None"


def ddpm_step(scheduler: PaperDDPMScheduler, step: Step, *, variance_type: str) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of x_t' by Algorithm 2 of Ho et al. 2020, for a step of any length."""
    t, prev_t = step.timestep, step.prev_timestep
    mean = scheduler.q_posterior(step.pred_original_sample, step.sample, t, prev_t)[0]
    log_variance = scheduler.reverse_log_variance(
        step.sample, t, prev_t, variance_type=variance_type, predicted_variance=step.predicted_variance
    )
    return mean, (0.5 * log_variance).exp()


def ddim_step(scheduler: PaperDDPMScheduler, step: Step, *, eta: float = 0.0) -> tuple[Tensor, float | None]:
    """Return the mean and the standard deviation of x_t' by eq. (12) of Song et al. 2021.

    The standard deviation is eta sqrt(beta~), by eq. (16). If eta is 0, None is returned in its place. As in stock
    diffusers, clipping x_0 does not change the predicted noise. So eta=1 and ddpm with fixed_small draw the same
    images only if clip=False.
    """
    alpha_bar_prev = scheduler.alphas_cumprod_at(step.prev_timestep)
    variance = eta**2 * scheduler.posterior_coefficients(step.timestep, step.prev_timestep)[2]
    signal, direction = alpha_bar_prev.sqrt().item(), (1 - alpha_bar_prev - variance).sqrt().item()
    mean = signal * step.pred_original_sample + direction * step.pred_epsilon
    return mean, variance.sqrt().item() if eta > 0 else None


def dpmsolver_step(scheduler: PaperDDPMScheduler, step: Step) -> tuple[Tensor, None]:
    """Return x_t' by Algorithm 2 (second order, multistep) of Lu et al. 2022, and None as its standard deviation.

    The paper is https://huggingface.co/papers/2211.01095. The last step, to the clean image, returns the predicted
    x_0. This is the limit of a first-order step. The predicted x_0 is clipped as the config says. diffusers'
    DPMSolverMultistepScheduler never clips. It draws the images that we draw with clip=False.
    """
    if step.prev_timestep < 0:
        return step.pred_original_sample, None

    def signal_noise_and_h(one: Step):
        alpha_bar = scheduler.alphas_cumprod_at(torch.tensor([one.timestep, one.prev_timestep])).double()
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return alpha, sigma, (alpha / sigma).log().diff().item()  # h: the change of log(alpha / sigma)

    alpha, sigma, h = signal_noise_and_h(step)
    mix = step.pred_original_sample
    if step.previous is not None:
        previous_h = signal_noise_and_h(step.previous)[2]
        mix = mix + (mix - step.previous.pred_original_sample) * (h / (2 * previous_h))
    return (sigma[1] / sigma[0]).item() * step.sample - (alpha[1] * math.expm1(-h)).item() * mix, None


# Each sampler is a function of (scheduler, step, *, settings). It returns the mean of x_t' and the standard deviation
# of the noise to add, or None in place of the deviation if no noise is added.
# The settings of a sampler are its keyword-only arguments. All except eta and variance_type are its own settings.
SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpmsolver++": dpmsolver_step}


def check_seed(seed: int) -> int:
    """Return `seed` as an int from -2^63 to 2^63 - 1. For these seeds, torch accepts seed + k.

    Raises:
        UserError: for another number, or if `seed` is not a whole number.
    """
    seed = whole_number("--seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed is {seed}, but must be a whole number from -2^63 to 2^63 - 1: give another one.")
    return seed


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image, seeded with `seed + k` for each k in `indices`, as EDM does.

    Image 1 of seed 0 therefore is image 0 of seed 1. For N other images, give a seed that is at least N higher.
    """
    return [torch.Generator().manual_seed(seed + k) for k in indices]


@torch.no_grad()
def draw(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    generators: Sequence[torch.Generator],
    *,
    sampler: str = "ddpm",
    num_inference_steps: int | None = None,  # None: all T, or all timesteps that `spacing` lists
    spacing: str | Sequence[int] = "leading",  # the default of diffusers; see PaperDDPMScheduler.subsequence
    eta: float = 0.0,  # how much fresh noise DDIM adds: 0 none, 1 as much as DDPM
    variance_type: str | None = None,  # None: see default_variance
    class_labels: Sequence[int] | Tensor | None = None,  # one per generator, for a conditional UNet
    size: tuple[int, int] | None = None,  # (H, W) of the images; None: the size that the UNet was trained on
    clip: bool = True,  # clip or threshold the predicted x_0 as the scheduler's config says
    dtype: torch.dtype = torch.float32,  # the UNet computes in this dtype, by autocast; the rest stays float32
    own_settings: dict | None = None,  # the settings of the sampler except eta and variance_type
    on_step: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw one image per CPU generator, and return float32 (B, C, H, W) in [-1, 1] on the UNet's device.

    Pixels that overflow, e.g. in float16 or because the training diverged, are nan.

    Args:
        unet: a UNet2DModel, or a module that is called like one and has `config`, `device` and `dtype`. It is in eval
            mode during the call.
        sampler: a name of `SAMPLERS`.
        on_step: called after each step as on_step(i, num_steps, sample, pred_original_sample).

    Raises:
        UserError: for settings that contradict each other, or timesteps that `PaperDDPMScheduler.subsequence` refuses.
    """
    check_settings(sampler, eta, variance_type, unet)
    labels = class_arguments(unet, class_labels, len(generators))
    scheduler = scheduler.in_stock_precision()
    timesteps = distinct_steps(scheduler, num_inference_steps, spacing)
    settings = {"eta": eta, "variance_type": variance_type or default_variance(scheduler, len(timesteps))}
    settings = {name: value for name, value in settings.items() if name in settings_of(sampler)} | (own_settings or {})

    shape = image_shape(unet, size)
    x = _noise(generators, shape, unet.device)
    step = None
    was_training = unet.training
    unet.eval()
    try:
        for i, (t, prev_t) in enumerate(timesteps):
            # Predict x_0 and the noise, in float32 even if the UNet computes in another dtype.
            with autocast(unet, dtype):
                output = unet(x.to(unet.dtype), torch.full((len(x),), t, device=unet.device), **labels).sample.float()
            predicted_variance = None
            if output.shape[1] == 2 * shape[0]:
                output, predicted_variance = output.chunk(2, dim=1)
            pred_original_sample = scheduler.predict_original_sample(output, x, t)
            epsilon = scheduler.predict_epsilon(output, x, t)
            if clip:
                pred_original_sample = clipped(pred_original_sample, scheduler)
            # Step from x_t to x_t'. Add fresh noise, unless x_t' is the clean image.
            previous = step and replace(step, previous=None)
            step = Step(t, prev_t, x, pred_original_sample, epsilon, predicted_variance, previous)
            result = SAMPLERS[sampler](scheduler, step, **settings)
            x, sigma = checked_step(sampler, result, step)
            if prev_t >= 0 and sigma is not None:
                x = x + sigma * _noise(generators, shape, unet.device)
            if on_step is not None:
                on_step(i, len(timesteps), x, pred_original_sample)
    finally:
        unet.train(was_training)
    # Turn infinite pixels into nan, because clamping would make them look like white or black pixels.
    return x.clamp(-1, 1).where(x.isfinite(), math.nan)


def distinct_steps(scheduler, num_inference_steps: int | None, spacing) -> list[tuple[int, int]]:
    """Return the pairs (t, t') of a subsequence. Leave out steps from t to the same t, because they change nothing."""
    return [(t, prev_t) for t, prev_t in scheduler.subsequence(num_inference_steps, spacing) if t != prev_t]


def checked_step(sampler: str, result, step: Step) -> tuple[Tensor, Tensor | float | None]:
    """Return `result`, the output of a sampler. Raise a UserError if it is not a mean and a standard deviation.

    Without this check, a tensor of two images would be unpacked as a mean and a deviation.
    """
    if isinstance(result, tuple) and len(result) == 2:
        mean = result[0]
        if isinstance(mean, Tensor) and mean.shape == step.sample.shape:
            return result
    given = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise UserError(
        f"the sampler {sampler} returned {given}, but must return a tuple: the mean of x_t', a tensor of shape "
        f"{tuple(step.sample.shape)}, and the standard deviation of the noise to add, or None."
    )


def settings_of(sampler: str) -> dict:
    """Return the settings of a sampler and their defaults: the keyword-only arguments of its function."""
    arguments = inspect.signature(SAMPLERS[sampler]).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.kind == argument.KEYWORD_ONLY}


def own_settings_of(sampler: str, given: dict) -> dict:
    """Return the settings of a sampler except eta and variance_type: the `given` ones, and defaults for the rest.

    Raises:
        UserError: for an unknown setting, a setting that has no default and is not given, or a value of a wrong type.
    """
    known = {name: value for name, value in settings_of(sampler).items() if name not in ("eta", "variance_type")}
    if flags := {"eta", "variance_type"} & set(given):
        raise UserError(f"{min(flags)} is not one of a sampler's own settings: give --{min(flags)} instead.")
    if unknown := set(given) - set(known):
        if not known:
            raise UserError(f"the sampler {sampler} has no settings of its own: leave {min(unknown)} out.")
        raise UserError(no_such(f"setting of the sampler {sampler}", min(unknown), sorted(known)))
    settings = known | given
    for name, value in settings.items():
        if value is inspect.Parameter.empty:
            raise UserError(f"the sampler {sampler} needs the setting {name}, which has no default: give {name}=...")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, int | float | str | None) or is_number and not math.isfinite(value):
            raise UserError(
                f"the setting {name} of the sampler {sampler} is {value!r}, which a record cannot hold: give a finite "
                "number, a text, True, False or None."
            )
        default = known[name]
        if isinstance(default, int | float) and not isinstance(default, bool) and not is_number:
            raise UserError(
                f"the setting {name} of the sampler {sampler} is {value!r}, but its default is the number {default}: "
                "give a number."
            )
    return settings


@functools.cache
def code_of(function: Callable) -> str | None:
    """Return 8 hex digits that change with the code of a sampler or metric. None for code of this package.

    The digits are a hash of the whole file that defines the function, because the function may call other functions of
    this file. In a notebook, the digits are a hash of the function's own source. If the source cannot be read, the
    digits are random, because nothing shows whether the code has changed.
    """
    if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    try:
        file = Path(inspect.getsourcefile(function) or "")
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else inspect.getsource(function)
    except (OSError, TypeError):
        return secrets.token_hex(4)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_settings(sampler: str, eta: float, variance_type: str | None, unet: nn.Module):
    """Raise a UserError for an unknown sampler, or for settings that the sampler or the UNet does not support."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; choose {', '.join(SAMPLERS)}.")
    if not 0 <= eta <= 1 or (eta != 0 and "eta" not in settings_of(sampler)):
        raise UserError(
            f"eta is {eta}, and the sampler is {sampler}: eta applies only to {samplers_with('eta')} and must be from "
            "0 to 1, so change eta or leave it out."
        )
    if variance_type is not None and "variance_type" not in settings_of(sampler):
        raise UserError(
            f"variance_type is {variance_type}, but the sampler is {sampler}: variance_type applies only to "
            f"{samplers_with('variance_type')}, so leave it out."
        )
    if variance_type == "learned_range" and unet.config.out_channels != 2 * unet.config.in_channels:
        raise UserError(
            "variance_type is learned_range, but the UNet predicts no variance: give fixed_small or fixed_large."
        )


def samplers_with(setting: str) -> str:
    """Return the names of the samplers that have a setting, e.g. "ddim" for eta."""
    return " and ".join(name for name in SAMPLERS if setting in settings_of(name))


def default_steps(sampler: str, num_train_timesteps: int) -> int:
    """Return the default number of steps: all T for ancestral sampling, 50 (at most T) for every other sampler."""
    return num_train_timesteps if sampler == "ddpm" else min(50, num_train_timesteps)


def default_variance(scheduler: PaperDDPMScheduler, num_steps: int) -> str:
    """Return the default variance type of ancestral sampling.

    On all T steps, this is the variance type of the scheduler's config. On fewer steps it is fixed_small, because
    fixed_large adds too much noise if steps are skipped (the FID is 2 to 4 times as large). learned_range is kept on
    any number of steps.
    """
    kept = num_steps == len(scheduler) or scheduler.config.variance_type == "learned_range"
    return scheduler.config.variance_type if kept else "fixed_small"


def autocast(unet: nn.Module, dtype: torch.dtype):
    """Return a context in which the UNet computes in `dtype`, by autocast. For float32, the context does nothing."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(unet.device.type, dtype)


def image_shape(unet: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a UNet draws. If `size` (H, W) is None, use the size in its config."""
    size = unet.config.sample_size if size is None else size
    return unet.config.in_channels, *((size, size) if isinstance(size, int) else size)


def _noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return standard normal noise. Each image has its own CPU generator, so its noise is equal on every device."""
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device)


def class_arguments(unet: nn.Module, class_labels, num_images: int) -> dict[str, Tensor]:
    """Return the labels as a keyword argument of the UNet: `{"class_labels": (num_images,) int64}` on its device.

    For an unconditional UNet, return {}.
    """
    num_classes = unet.config.num_class_embeds
    if num_classes is None and class_labels is None:
        return {}
    if num_classes is None:
        raise UserError(f"class_labels are {class_labels}, but this UNet has no classes: leave class_labels out.")
    labels = torch.as_tensor([] if class_labels is None else class_labels)
    if labels.shape != (num_images,) or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"class_labels are {labels.tolist()}; give {num_images} labels, one per image, each from 0 to "
            f"{num_classes - 1}."
        )
    return {"class_labels": labels.to(unet.device)}


def clipped(pred_original_sample: Tensor, scheduler: PaperDDPMScheduler) -> Tensor:
    """Return a predicted x_0 (B, C, H, W), clipped or thresholded as the scheduler's config says."""
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(pred_original_sample)
    if scheduler.config.clip_sample:
        return pred_original_sample.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return pred_original_sample
