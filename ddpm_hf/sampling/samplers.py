"""Images from noise: ancestral DDPM sampling, DDIM and DPM-Solver++, over any subsequence of the timesteps.

Image k is image k: it is drawn from `torch.Generator().manual_seed(seed + k)` alone, in the order in which stock
pipelines draw, so `DDPMPipeline(...)(generator=torch.Generator().manual_seed(seed + k))` redraws it, whatever batch or
process it came from here. Up to float round-off: 1e-5 in [-1, 1], which now and then is one grey level.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..diffusion.scheduler import PaperDDPMScheduler
from ..errors import UserError


METHODS = ("ddpm", "ddim", "dpmsolver++")


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, seeded `seed + k` for k in `indices` (EDM's convention: seeds s..s+N-1)."""
    return [torch.Generator().manual_seed(seed + k) for k in indices]


@torch.no_grad()
def sample(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    generators: Sequence[torch.Generator],
    *,
    method: str = "ddpm",
    num_inference_steps: int | None = None,  # None: all T, or as many as spacing lists
    spacing: str | Sequence[int] = "leading",  # see PaperDDPMScheduler.subsequence
    eta: float = 0.0,  # DDIM's share of fresh noise: 0 none, 1 as much as DDPM
    variance_type: str | None = None,  # None: the config's on all T steps, fixed_small on fewer; learned_range stays
    class_labels: Sequence[int] | torch.Tensor | None = None,  # one per generator, for a conditional UNet
    clip: bool = True,  # clip or threshold the predicted x_0 as the scheduler's config says
    dtype: torch.dtype = torch.float32,  # what the UNet computes in: below float32 by autocast, all else stays float32
    on_step: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Draw one image per CPU generator: float32 (B, C, H, W) in [-1, 1], on the UNet's device.

    `unet` is a UNet2DModel or anything with its call, `config`, `device` and `dtype`; it is in eval mode for the call.
    "ddpm" is Algorithm 2 of Ho et al. 2020 with the posterior of the steps taken, "ddim" eq. (12) of Song et al. 2021,
    "dpmsolver++" the second-order multistep Algorithm 2 of Lu et al. 2022 (https://huggingface.co/papers/2211.01095).
    As in stock diffusers, ddim leaves eps as it was where it clips x_0, so eta=1 equals ddpm only with clip=False.
    `on_step(i, num_steps, sample, pred_original_sample)` is called after each step. Bad arguments are a UserError.
    """
    check_method(method, eta, variance_type, unet)
    labels = _class_labels(unet, class_labels, len(generators))
    scheduler = scheduler.in_stock_precision()
    # A repeated timestep is a step from t to t: it changes nothing.
    steps = [(t, prev_t) for t, prev_t in scheduler.subsequence(num_inference_steps, spacing) if t != prev_t]
    variance_type = variance_type or default_variance(scheduler, len(steps))

    shape = _image_shape(unet)
    x = _noise(generators, shape, unet.device)
    previous = None  # what dpmsolver++ remembers of the step before
    was_training = unet.training
    unet.eval()
    try:
        for i, (t, prev_t) in enumerate(steps):
            # Predict x_0, in float32 whatever the UNet computes in.
            timesteps = torch.full((len(x),), t, device=unet.device)
            with _autocast(unet, dtype):
                output = unet(x.to(unet.dtype), timesteps, **labels).sample.float()
            predicted_variance = None
            if output.shape[1] == 2 * shape[0]:
                output, predicted_variance = output.chunk(2, dim=1)
            pred_original_sample = scheduler.predict_original_sample(output, x, t)
            epsilon = scheduler.predict_epsilon(output, x, t)
            if clip:
                pred_original_sample = clipped(pred_original_sample, scheduler)

            # Step from x_t to x_t', noise included except into the clean image.
            if method == "ddim":
                x, sigma = _ddim_mean_and_sigma(scheduler, pred_original_sample, epsilon, t, prev_t, eta)
            elif method == "dpmsolver++":
                x, previous = _dpmsolver_step(scheduler, pred_original_sample, x, t, prev_t, previous)
            else:
                x = scheduler.q_posterior(pred_original_sample, x, t, prev_t)[0]
                log_variance = scheduler.reverse_log_variance(
                    x, t, prev_t, variance_type, predicted_variance=predicted_variance
                )
                sigma = (0.5 * log_variance).exp()
            if prev_t >= 0 and (method == "ddpm" or eta > 0):
                x = x + sigma * _noise(generators, shape, unet.device)
            if on_step is not None:
                on_step(i, len(steps), x, pred_original_sample)
    finally:
        unet.train(was_training)
    return x.clamp(-1, 1)


def check_method(method: str, eta: float, variance_type: str | None, unet: nn.Module):
    """Refuse what `sample` cannot do, with a UserError, before anything is drawn."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose {', '.join(METHODS)}.")
    if not 0 <= eta <= 1 or (method != "ddim" and eta != 0):
        raise UserError(f"eta is {eta} with method {method}; it belongs to ddim and is from 0 to 1.")
    if method != "ddpm" and variance_type is not None:
        raise UserError(f"variance_type is {variance_type} with method {method}; it belongs to ddpm; leave it out.")
    if variance_type == "learned_range" and unet.config.out_channels != 2 * unet.config.in_channels:
        raise UserError("variance_type learned_range needs a UNet with out_channels twice its in_channels.")


def default_variance(scheduler: PaperDDPMScheduler, num_steps: int) -> str:
    """Return the variance of ancestral sampling by default: the config's, on fewer than T steps fixed_small.

    fixed_large overshoots where steps are skipped, by a factor 2 to 4 in FID. learned_range stays.
    """
    kept = num_steps == len(scheduler) or scheduler.config.variance_type == "learned_range"
    return scheduler.config.variance_type if kept else "fixed_small"


def _autocast(unet: nn.Module, dtype: torch.dtype):
    """float32 leaves an autocast of the caller's as it is."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(unet.device.type, dtype)


def _image_shape(unet: nn.Module) -> tuple[int, int, int]:
    size = unet.config.sample_size
    return unet.config.in_channels, *((size, size) if isinstance(size, int) else size)


def _noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Standard normal noise, each image from its own CPU generator, so that no device's generator has a say."""
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device)


def _class_labels(unet: nn.Module, class_labels, num_images: int) -> dict[str, torch.Tensor]:
    """The labels as the UNet's argument, or no argument for an unconditional UNet."""
    num_classes = unet.config.num_class_embeds
    if class_labels is None and num_classes is None:
        return {}
    if class_labels is None or num_classes is None:
        wanted = "without class_labels" if num_classes is None else f"with class_labels from 0 to {num_classes - 1}"
        raise UserError(f"This UNet was trained {wanted}; class_labels are {class_labels}.")
    labels = torch.as_tensor(class_labels)
    if labels.shape != (num_images,) or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"class_labels are {labels.tolist()}; give {num_images}, one per image, each from 0 to {num_classes - 1}."
        )
    return {"class_labels": labels.to(unet.device)}


def clipped(pred_original_sample: torch.Tensor, scheduler: PaperDDPMScheduler) -> torch.Tensor:
    """Return a predicted x_0 clipped, or thresholded, as the scheduler's config says."""
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(pred_original_sample)
    if scheduler.config.clip_sample:
        return pred_original_sample.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return pred_original_sample


def _ddim_mean_and_sigma(scheduler, pred_original_sample, epsilon, t, prev_t, eta):
    """Mean and sigma of eq. (12) of Song et al. 2021, with sigma = eta sqrt(beta~) as in its eq. (16)."""
    alpha_bar_prev = scheduler.alphas_cumprod_at(prev_t)
    variance = eta**2 * scheduler.posterior_coefficients(t, prev_t)[2]
    direction = (1 - alpha_bar_prev - variance).sqrt()
    mean = alpha_bar_prev.sqrt().item() * pred_original_sample + direction.item() * epsilon
    return mean, variance.sqrt().item()


def _dpmsolver_step(scheduler, pred_original_sample, x, t, prev_t, previous):
    """x_t' by Algorithm 2 of Lu et al. 2022, and what the next step needs: this x_0 and the step in log-SNR.

    The last step, to the clean image, is the predicted x_0: the limit of the first-order step.
    """
    if prev_t < 0:
        return pred_original_sample, None
    alpha_bar = scheduler.alphas_cumprod_at(torch.tensor([t, prev_t])).double()
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    h = ((alpha / sigma).log().diff()).item()
    mix = pred_original_sample
    if previous is not None:
        previous_x0, previous_h = previous
        mix = mix + (mix - previous_x0) * (h / (2 * previous_h))
    x = (sigma[1] / sigma[0]).item() * x - (alpha[1] * math.expm1(-h)).item() * mix
    return x, (pred_original_sample, h)
