"""Compute the variational bound on -log p(x_0) in bits per dimension: one term for training, all terms for scoring.

L = sum_{t >= 0} L_t + L_prior (Ho et al. 2020, eq. 5). t counts from 0, as in diffusers: L_0 is the discretised
decoder, and L_t for t > 0 is a KL divergence between Gaussians.

All coefficients come from the scheduler's float64 tables. With diffusers' float32 `alphas_cumprod` the total would be
wrong by 0.003 bits/dim. With the variance of diffusers' `_get_variance(0)`, L_0 would be ten times as large.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..memory import in_batches
from ..output import PASSING_BAR
from ..randomness import keyed_generator
from .scheduler import PaperDDPMScheduler


FLOOR = 1e-12  # the lowest probability of a pixel, as in Ho's and Nichol's code
PILOT_EVALUATIONS = 16_000  # 16 images for T = 1000. Few images suffice: the bound is unbiased for any p_t.
PILOT_SHARE = 4  # the pilot takes at most this many times the evaluations that the bound itself takes


def variational_term(
    scheduler: PaperDDPMScheduler,
    images: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prediction: Tensor,
    *,
    predicted_variance: Tensor | None = None,
    variance_type: str,
    clip: bool = False,
) -> Tensor:
    """Return one term of the bound for each image, (B,) in bits/dim: float64 for float64 images, else float32.

    The term is KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), or -log p_theta(x_0 | x_1) for the first timestep
    (Ho et al. 2020, eq. 5 and 13). In these formulas t counts from 1, but `timesteps` count from 0.

    Args:
        images, noisy: x_0 = k/127.5 - 1 and x_t, both (B, C, H, W); `timesteps` is (B,).
        prediction: (B, C, H, W), of the scheduler's prediction type.
        predicted_variance: for learned_range, the last C of the UNet's 2C output channels, not clamped (Nichol &
            Dhariwal 2021, eq. 15).
        variance_type: see `PaperDDPMScheduler.reverse_log_variance`. It raises a UserError for an unknown type.
        clip: clamp the predicted x_0 to [-1, 1]. The papers do so when they score a model, but not in training.
    """
    options = dict(predicted_variance=predicted_variance, variance_type=variance_type, clip=clip)
    nats = _nats_per_pixel(scheduler, images, noisy, timesteps, prediction, **options)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _nats_per_pixel(
    scheduler, images, noisy, timesteps, prediction, *, predicted_variance, variance_type, clip
) -> Tensor:
    """Return the term of each pixel (B, C, H, W) in nats. The arguments are those of `variational_term`."""
    pred_original_sample = scheduler.predict_original_sample(prediction, noisy, timesteps)
    if clip:
        pred_original_sample = pred_original_sample.clamp(-1, 1)
    true_log_variance = scheduler.reverse_log_variance(noisy, timesteps, None, "fixed_small")
    log_variance = scheduler.reverse_log_variance(
        noisy, timesteps, None, variance_type, predicted_variance=predicted_variance
    )
    # Both means contain c_t x_t, so subtract only the x_0 parts. This keeps precision when c_0 is small.
    coefficient_0 = scheduler.posterior_coefficients(timesteps)[0].to(noisy.dtype).view(-1, 1, 1, 1)
    mean_difference = coefficient_0 * (images - pred_original_sample)
    difference = true_log_variance - log_variance
    kl = 0.5 * (torch.expm1(difference) - difference + mean_difference**2 * torch.exp(-log_variance))
    # At t = 0 the mean of the posterior is the predicted x_0.
    first = -discretized_log_likelihood(images, pred_original_sample, log_variance)
    return torch.where((timesteps == 0).view(-1, 1, 1, 1), first, kl)


def discretized_log_likelihood(images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-probability in nats of each 8-bit pixel: the log of a Gaussian's integral over the pixel's bin.

    This is eq. 13 of Ho et al. 2020. The normal CDF is approximated by tanh, and each probability is raised to at
    least 1e-12, as in the code that computed the published bits/dim. The error is about 0.01 bits/dim at t = 0. All
    arguments have the shape (B, C, H, W) or broadcast to it. Images are k/127.5 - 1.
    """
    deviation, inverse_std = images - mean, torch.exp(-0.5 * log_variance)
    upper = normal_cdf(inverse_std * (deviation + 1 / 255))
    lower = normal_cdf(inverse_std * (deviation - 1 / 255))
    # The bins of levels 255 and 0 reach to infinity.
    upper = torch.where(images > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(images < -0.999, torch.zeros_like(lower), lower)
    return torch.log((upper - lower).clamp(min=FLOOR))


def normal_cdf(z: Tensor) -> Tensor:
    """Return the standard normal CDF, approximated by tanh as in Ho's and Nichol's code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def prior_term(scheduler: PaperDDPMScheduler, images: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) for each image, float64 (B,) in bits/dim; images (B, C, H, W) in [-1, 1].

    This is L_prior (Ho et al. 2020, eq. 5). It measures how much of the image the schedule leaves at the last
    timestep, so it does not depend on the model.
    """
    alpha_bar = scheduler.alphas_cumprod64[-1]
    square = images.to("cpu", torch.float64).square().mean(dim=(1, 2, 3))
    return 0.5 * (alpha_bar * square - alpha_bar - torch.log1p(-alpha_bar)) / math.log(2)


@torch.no_grad()
def bound_terms(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    images: Tensor,
    indices: Sequence[int],
    evaluations: Iterator[tuple[int, int, float]],
    *,
    num_evaluations: int,
    batch_size: int = 64,
    progress: bool = True,
    **options,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Evaluate terms of the bound in batches, and yield (rows, timesteps, weights, bits, floored) for each batch.

    All five are tensors (B,) on the CPU. `bits` are the terms in bits/dim, float64. `floored` is the share of pixels
    whose probability was raised to FLOOR. A batch mixes images and timesteps. The UNet computes in its own dtype, in
    eval mode.

    Args:
        images: uint8 (N, C, H, W).
        indices: the index of each image in the data set. The noise of image i at t is keyed by (seed, i, t), so
            batch size and the number of processes do not change the noise.
        evaluations: triples (row of `images`, timestep, weight).
        num_evaluations: the length of `evaluations`, for the progress bar.
        options: the arguments seed, variance_type, clip and class_labels of `_evaluate`.

    Raises:
        UserError: if the images are not uint8, or if variance_type is learned_range but the UNet has no 2C outputs.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"images are {images.dtype}; the bound is on 8-bit images: give uint8 from 0 to 255.")
    evaluations, was_training = iter(evaluations), unet.training

    def evaluate(batch: list[tuple[int, int, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows, timesteps = (torch.tensor([pair[k] for pair in batch]) for k in (0, 1))
        weights = torch.tensor([weight for _, _, weight in batch], dtype=torch.float64)
        numbers = [indices[row] for row in rows.tolist()]
        bits, floored = _evaluate(unet, scheduler, images[rows], numbers, timesteps, rows=rows, **options)
        return rows, timesteps, weights, bits, floored

    unet.eval()
    try:
        bar_options = dict(PASSING_BAR, unit="evaluation", disable=not progress)
        with tqdm(desc="Bits/dim", total=num_evaluations, **bar_options) as bar:
            for batch, terms in in_batches(evaluate, iter(lambda: list(islice(evaluations, batch_size)), [])):
                yield terms
                bar.update(len(batch))
    finally:
        unet.train(was_training)


def _evaluate(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    images: Tensor,
    indices: Sequence[int],
    timesteps: Tensor,
    *,
    rows: Tensor,
    seed: int = 0,
    variance_type: str | None = None,  # None: that of the scheduler's config
    clip: bool = True,
    class_labels: Tensor | None = None,  # (N,), one per image, for a conditional UNet
) -> tuple[Tensor, Tensor]:
    """Return `bits` and `floored` of one batch, as in `bound_terms`: both float64 (B,) on the CPU."""
    device = torch.device("cpu") if unet.device.type == "mps" else unet.device  # MPS has no float64
    generators = [keyed_generator(seed, "bound", index, t) for index, t in zip(indices, timesteps.tolist())]
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    x0, t = images.to(device, torch.float64) / 127.5 - 1, timesteps.to(device)
    noisy = scheduler.q_sample(x0, noise.to(device, torch.float64), t)
    labels = None if class_labels is None else class_labels[rows].to(unet.device)
    output = unet(noisy.to(unet.device, unet.dtype), t.to(unet.device), class_labels=labels).sample
    prediction, predicted_variance = output.to(device, torch.float64), None
    if prediction.shape[1] == 2 * images.shape[1]:
        prediction, predicted_variance = prediction.chunk(2, dim=1)
    nats = _nats_per_pixel(
        scheduler,
        x0,
        noisy,
        t,
        prediction,
        predicted_variance=predicted_variance,
        variance_type=variance_type or scheduler.config.variance_type,
        clip=clip,
    )
    floored = (nats > -math.log(FLOOR) - 1e-4) & (t == 0).view(-1, 1, 1, 1)
    return (nats.mean(dim=(1, 2, 3)) / math.log(2)).cpu(), floored.double().mean(dim=(1, 2, 3)).cpu()


def bits_per_dim(
    unet: nn.Module,
    scheduler: PaperDDPMScheduler,
    images: Tensor,
    indices: Sequence[int],
    *,
    num_timesteps: int | None = None,
    pilot: Tensor | None = None,
    seed: int = 0,
    **options,
) -> dict[str, Tensor]:
    """Return a dict with the bound of each image and its parts, in bits per dimension. `summarise` averages them.

    Each value is float64 (N,). "bits_per_dim" is "L0" + "L1_to_last" (the sum over t = 1 .. T-1) + "prior". "floored"
    is the share of pixels whose probability was raised to FLOOR. "bits_per_dim" is a bound only if this share is 0.
    One noise is drawn for each image and t.

    Args:
        images: uint8 (N, C, H, W), all images of a data set or some of them.
        indices: the index of each image in the data set. It decides the noise of the image.
        num_timesteps: None evaluates all T terms. A number K evaluates L_0 and K - 1 random t > 0, as described in
            `_drawn_evaluations`. The result is unbiased: its mean over the draws is the full bound.
        pilot: the probabilities p_t of the draws, from `pilot_probabilities`. None computes them from a few images.
        options: the other keyword arguments of `bound_terms`.

    Raises:
        UserError: if num_timesteps is outside 2 .. T, and for the same reasons as in `bound_terms`.
    """
    T, num_images = scheduler.config.num_train_timesteps, len(images)
    if num_timesteps is None:
        evaluations, count = ((row, t, 1.0) for row in range(num_images) for t in range(T)), num_images * T
    else:
        if not 2 <= num_timesteps <= T:
            raise UserError(f"num_timesteps is {num_timesteps}; it must be from 2 to the model's {T} timesteps.")
        if pilot is None:
            labels = options.get("class_labels")
            n = num_pilot_images(T, num_images * num_timesteps)
            few = options | {"class_labels": None if labels is None else labels[:n]}
            pilot = pilot_probabilities(unet, scheduler, images[:n], indices[:n], seed=seed, **few)
        evaluations = _drawn_evaluations(pilot, num_timesteps, seed, indices)
        count = len(evaluations)
    first, rest, floored = torch.zeros(3, num_images, dtype=torch.float64)
    for rows, timesteps, weights, bits, floored_share in bound_terms(
        unet, scheduler, images, indices, evaluations, num_evaluations=count, seed=seed, **options
    ):
        is_first = timesteps == 0
        first.index_add_(0, rows, bits * is_first)
        rest.index_add_(0, rows, bits * weights * ~is_first)
        floored.index_add_(0, rows, floored_share)
    prior = prior_term(scheduler, images.double() / 127.5 - 1)
    total = first + rest + prior
    return {"bits_per_dim": total, "L0": first, "L1_to_last": rest, "prior": prior, "floored": floored}


def summarise(bounds: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of the tensors of `bits_per_dim`, the standard error of the bound, and the number of images.

    The standard error is over images, and nan for a single image. First concatenate the results of all processes.
    """
    total = bounds["bits_per_dim"]
    means = {name: float(values.mean()) for name, values in bounds.items()}
    standard_error = float(total.std()) / math.sqrt(len(total)) if len(total) > 1 else math.nan
    return means | {"standard_error": standard_error, "num_images": len(total)}


def num_pilot_images(num_train_timesteps: int, num_evaluations: int) -> int:
    """Return how many images to give to `pilot_probabilities`: from 2 to 64, fewer for a larger T.

    Args:
        num_evaluations: how many terms the bound evaluates after the pilot. For a small number, the pilot is small.
    """
    most = min(PILOT_EVALUATIONS, PILOT_SHARE * num_evaluations)
    return max(2, min(64, most // num_train_timesteps))


def pilot_probabilities(unet, scheduler, images, indices, **options) -> Tensor:
    """Return the probabilities p_t, float64 (T,), with which `bits_per_dim` draws timesteps.

    p_0 is 0, because `bits_per_dim` evaluates the term of t = 0 for every image and does not draw t = 0. The arguments
    are those of `bound_terms`. All T timesteps of every image are evaluated; 16 to 64 images are enough.
    """
    T = scheduler.config.num_train_timesteps
    evaluations = ((row, t, 1.0) for row in range(len(images)) for t in range(T))
    squares = torch.zeros(T, dtype=torch.float64)
    for _, timesteps, _, bits, _ in bound_terms(
        unet, scheduler, images, indices, evaluations, num_evaluations=len(images) * T, **options
    ):
        squares.index_add_(0, timesteps, bits**2)
    return torch.cat([torch.zeros(1, dtype=torch.float64), importance_probabilities(squares[1:])])


def importance_probabilities(second_moments: Tensor) -> Tensor:
    """Return p_t (n,) proportional to sqrt(E[L_t^2]), plus 0.1 % of the uniform distribution, so that no p_t is 0.

    This is eq. 18 of Nichol & Dhariwal 2021; the 0.1 % is from their code. Multiplying all `second_moments` (n,) by
    the same factor does not change p_t.
    """
    p = second_moments.sqrt()
    return 0.999 * p / p.sum() + 0.001 / len(p)


def _drawn_evaluations(pilot: Tensor, num_timesteps: int, seed: int, indices) -> list[tuple[int, int, float]]:
    """Return the evaluations (row, timestep, weight): for each image, t = 0 and `num_timesteps` - 1 random t > 0.

    This is the importance sampling of Nichol & Dhariwal 2021, section 3.3: p_t is proportional to sqrt(E[L_t^2]). One
    draw comes from each of `num_timesteps` - 1 slices of equal probability. A t that is drawn twice is evaluated once.
    """
    return [
        (row, t, weight)
        for row, index in enumerate(indices)
        for t, weight in [(0, 1.0), *_stratified_draws(pilot, num_timesteps - 1, seed, index)]
    ]


def _stratified_draws(probabilities: Tensor, count: int, seed: int, index: int) -> list[tuple[int, float]]:
    """Return pairs (t, weight): draw one t from each of `count` slices of equal probability, then merge equal t."""
    uniform = torch.rand(count, dtype=torch.float64, generator=keyed_generator(seed, "bound timesteps", index))
    timesteps = draw_from(probabilities, (torch.arange(count) + uniform) / count)
    drawn, times = timesteps.unique(return_counts=True)
    return list(zip(drawn.tolist(), (times / (count * probabilities[drawn])).tolist()))


def draw_from(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return timesteps (B,) int64, drawn from `probabilities` (T,) with random numbers `uniform` (B,) in [0, 1)."""
    cumulative = probabilities.cumsum(0)
    # Rounding may leave the last sum at 1 - 1e-16. A number above it belongs to the last timestep.
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(cumulative) - 1)
