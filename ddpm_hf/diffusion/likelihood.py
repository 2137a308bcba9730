"""The variational bound on -log p(x_0) in bits per dimension: one term of it for training, all of it for scoring.

L = sum_{t >= 0} L_t + L_prior (Ho et al. 2020, eq. 5). t counts from 0, as in diffusers: L_0 is the discretised
decoder, and L_t for t > 0 is a KL divergence between Gaussians.

All coefficients come from the scheduler's float64 tables. With diffusers' float32 `alphas_cumprod` the total would be
wrong by 0.003 bits/dim, and with the variance of its `_get_variance(0)` L_0 would be ten times as large.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..randomness import keyed_generator
from .scheduler import PaperDDPMScheduler


FLOOR = 1e-12  # the lowest probability of a pixel, as in Ho's and Nichol's code
PILOT_EVALUATIONS = 16_000  # 16 images for T = 1000. The bound is unbiased however few images p_t comes from.


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
    """Return one term of the bound per image (B,), in bits per dimension; float64 for float64 images, else float32.

    The term is KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) for t > 0 and -log p_theta(x_0 | x_1) for t = 0
    (Ho et al. 2020, eq. 5 and 13).

    Args:
        images, noisy: x_0 = k/127.5 - 1 and x_t, both (B, C, H, W); `timesteps` is (B,).
        prediction: (B, C, H, W), of the scheduler's prediction type.
        predicted_variance: the UNet's other C channels, for learned_range; not clamped (Nichol 2021, eq. 15).
        variance_type: as in `PaperDDPMScheduler.reverse_log_variance`, which raises UserError for an unknown one.
        clip: clamp the predicted x_0 to [-1, 1]. The papers do so when they score a model, but not in training.
    """
    options = dict(predicted_variance=predicted_variance, variance_type=variance_type, clip=clip)
    nats = _nats_per_pixel(scheduler, images, noisy, timesteps, prediction, **options)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _nats_per_pixel(
    scheduler, images, noisy, timesteps, prediction, *, predicted_variance, variance_type, clip
) -> Tensor:
    """Return the term of each pixel (B, C, H, W) in nats, for the arguments of `variational_term`."""
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
    """Return the log-probability in nats of each 8-bit pixel under a Gaussian integrated over the pixel's bin.

    Ho et al. 2020, eq. 13. The normal CDF is approximated by tanh and a probability is at least 1e-12, as in the code
    that the published bits/dim were computed with; that is about 0.01 bits/dim from the exact value at t = 0. All
    arguments are (B, C, H, W), or broadcast to it; images are k/127.5 - 1.
    """
    deviation, inverse_std = images - mean, torch.exp(-0.5 * log_variance)
    upper = normal_cdf(inverse_std * (deviation + 1 / 255))
    lower = normal_cdf(inverse_std * (deviation - 1 / 255))
    # The bins of levels 255 and 0 reach to infinity.
    upper = torch.where(images > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(images < -0.999, torch.zeros_like(lower), lower)
    return torch.log((upper - lower).clamp(min=FLOOR))


def normal_cdf(z: Tensor) -> Tensor:
    """Return the standard normal CDF by the tanh approximation of Ho's and Nichol's code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def prior_term(scheduler: PaperDDPMScheduler, images: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) per image (B,) in bits/dim, float64; images (B, C, H, W) in [-1, 1].

    Ho et al. 2020, eq. 5. It measures how much of the image the schedule leaves at the last timestep, so it depends on
    no model.
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
    on_step: Callable[[int, int], None] | None = None,  # called with (evaluations done, evaluations in all)
    progress: bool = True,
    **options,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield (rows, timesteps, weights, bits, floored) for batches of `evaluations`, each (row, timestep, weight).

    All five are (B,) on the CPU: `bits` are float64 terms in bits/dim, `floored` is the share of pixels whose
    probability is at the decoder's floor. A batch mixes images and timesteps. The UNet computes in its own dtype and
    is in eval mode while this runs.

    Args:
        images: uint8 (N, C, H, W).
        indices: the number of each image in the data set. The noise of image i at t is keyed by (seed, i, t), so
            neither batch size nor the number of processes changes it.
        num_evaluations: the length of `evaluations`, for the progress bar.
        options: seed, variance_type, clip, dtype and class_labels of `_evaluate`.

    Raises:
        UserError: if the images are not uint8, or if variance_type learned_range meets a UNet without 2C outputs.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"images are {images.dtype}; the bound is on 8-bit images: give uint8 from 0 to 255.")
    evaluations, was_training, done = iter(evaluations), unet.training, 0
    unet.eval()
    try:
        with tqdm(desc="Bits/dim", total=num_evaluations, unit="evaluation", disable=not progress) as bar:
            while batch := list(islice(evaluations, batch_size)):
                rows, timesteps = (torch.tensor([pair[k] for pair in batch]) for k in (0, 1))
                weights = torch.tensor([weight for _, _, weight in batch], dtype=torch.float64)
                numbers = [indices[row] for row in rows.tolist()]
                bits, floored = _evaluate(unet, scheduler, images[rows], numbers, timesteps, rows=rows, **options)
                yield rows, timesteps, weights, bits, floored
                bar.update(len(batch))
                done += len(batch)
                if on_step is not None:
                    on_step(done, num_evaluations)
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
    variance_type: str | None = None,  # None: the config's
    clip: bool = True,
    dtype: torch.dtype = torch.float64,  # of all but the UNet; float32 (MPS has no other) changes a term by 1e-5
    class_labels: Tensor | None = None,  # (N,), of all images, for a conditional UNet
) -> tuple[Tensor, Tensor]:
    """Return the terms in bits/dim and the share of floored pixels, float64 (B,) on the CPU, of one batch."""
    device = unet.device
    generators = [keyed_generator(seed, "bound", index, t) for index, t in zip(indices, timesteps.tolist())]
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    x0, t = images.to(device, dtype) / 127.5 - 1, timesteps.to(device)
    noisy = scheduler.q_sample(x0, noise.to(device, dtype), t)
    labels = None if class_labels is None else class_labels[rows].to(device)
    prediction, predicted_variance = unet(noisy.to(unet.dtype), t, class_labels=labels).sample.to(dtype), None
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
    means = (nats.mean(dim=(1, 2, 3)) / math.log(2), floored.to(dtype).mean(dim=(1, 2, 3)))
    return tuple(mean.to("cpu", torch.float64) for mean in means)


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
    """Return the bound of each image in bits per dimension: float64 (N,) each, to be averaged by `summarise`.

    "bits_per_dim" is "L0" + "L1_to_last" (the sum over t = 1 .. T-1) + "prior". "floored" is the share of pixels at
    the decoder's floor; unless it is 0, the number is not a bound. Each image and t has one noise.

    Args:
        images, indices: uint8 (N, C, H, W), any part of a data set, and the number of each image in it.
        num_timesteps: None for all T terms. K evaluates L_0 and K - 1 draws of t > 0, see `_drawn_evaluations`; the
            result is unbiased: its mean over the draws is the full bound.
        pilot: p_t, the probabilities of the draws, from `pilot_probabilities`; None takes them from the first images.
        options: the other keywords of `bound_terms`.

    Raises:
        UserError: for a num_timesteps outside 2 .. T, and as `bound_terms`.
    """
    T, num_images = scheduler.config.num_train_timesteps, len(images)
    if num_timesteps is None:
        evaluations, count = ((row, t, 1.0) for row in range(num_images) for t in range(T)), num_images * T
    else:
        if not 2 <= num_timesteps <= T:
            raise UserError(f"num_timesteps is {num_timesteps}; it must be from 2 to the model's {T} timesteps.")
        if pilot is None:
            labels = options.get("class_labels")
            n = num_pilot_images(T)
            few = options | {"class_labels": None if labels is None else labels[:n], "on_step": None}
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
    """Return the means of the tensors of `bits_per_dim`, and the total's standard error over images (nan for one).

    Concatenate the results of several processes first.
    """
    total = bounds["bits_per_dim"]
    means = {name: float(values.mean()) for name, values in bounds.items()}
    standard_error = float(total.std()) / math.sqrt(len(total)) if len(total) > 1 else math.nan
    return means | {"standard_error": standard_error, "num_images": len(total)}


def num_pilot_images(num_train_timesteps: int) -> int:
    """Return how many images to give to `pilot_probabilities`, from 1 to 64; it evaluates all T timesteps of each."""
    return max(1, min(64, PILOT_EVALUATIONS // num_train_timesteps))


def pilot_probabilities(unet, scheduler, images, indices, **options) -> Tensor:
    """Return p_t (T,), float64, for `bits_per_dim` with few timesteps: 0 at t = 0, which is always evaluated.

    The arguments are those of `bound_terms`. All T timesteps of every image are evaluated; 16 to 64 images are enough.
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
    """Return p_t (n,) proportional to sqrt(E[L_t^2]), with 0.1 % of uniform mixed in so that none is 0.

    Nichol & Dhariwal 2021, eq. 18, and their code. `second_moments` (n,) may have any common factor.
    """
    p = second_moments.sqrt()
    return 0.999 * p / p.sum() + 0.001 / len(p)


def _drawn_evaluations(pilot: Tensor, num_timesteps: int, seed: int, indices) -> list[tuple[int, int, float]]:
    """Return the evaluations (row, timestep, weight): t = 0, and `num_timesteps` - 1 draws of t > 0, of each image.

    This is the importance sampling of Nichol & Dhariwal 2021, section 3.3: p_t is proportional to sqrt(E[L_t^2]). One
    draw comes from each of `num_timesteps` - 1 slices of equal probability; equal draws are evaluated once.
    """
    return [
        (row, t, weight)
        for row, index in enumerate(indices)
        for t, weight in [(0, 1.0), *_stratified_draws(pilot, num_timesteps - 1, seed, index)]
    ]


def _stratified_draws(probabilities: Tensor, count: int, seed: int, index: int) -> list[tuple[int, float]]:
    """Return pairs (t, weight): one draw from each of `count` slices of equal probability, equal draws merged."""
    uniform = torch.rand(count, dtype=torch.float64, generator=keyed_generator(seed, "bound timesteps", index))
    timesteps = draw_from(probabilities, (torch.arange(count) + uniform) / count)
    drawn, times = timesteps.unique(return_counts=True)
    return list(zip(drawn.tolist(), (times / (count * probabilities[drawn])).tolist()))


def draw_from(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return timesteps (B,) int64 drawn from probabilities (T,) by the numbers `uniform` in [0, 1), float64 (B,)."""
    cumulative = probabilities.cumsum(0)
    # Rounding may leave the last sum at 1 - 1e-16. A number above it belongs to the last timestep.
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(cumulative) - 1)
