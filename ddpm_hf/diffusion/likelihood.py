"""The variational bound on -log p(x_0) in bits per dimension: one term of it for training, all of it for scoring.

L = sum_{t >= 0} L_t + L_prior (Ho et al. 2020, eq. 5), t counted from 0 as in diffusers: L_0 is the discretised
decoder, L_t for t > 0 a KL between Gaussians. All coefficients come from the scheduler's float64 tables: from
diffusers' float32 `alphas_cumprod` the total is 0.003 bits/dim off, and with the variance of its `_get_variance(0)`
L_0 is ten times as large.
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


FLOOR = 1e-12  # of a pixel's probability, in Ho's and Nichol's code
PILOT_EVALUATIONS = 16_000  # 16 images for T = 1000: the estimate is unbiased, however few make p_t


def variational_term(
    scheduler: PaperDDPMScheduler,
    images: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prediction: Tensor,
    predicted_variance: Tensor | None = None,
    *,
    variance_type: str,
    clip: bool = False,
    decoder: str = "tanh",
) -> Tensor:
    """Return one term of the bound per image (B,), in bits per dimension; float64 for float64 images, else float32.

    KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) for t > 0 and -log p_theta(x_0 | x_1) for t = 0 (Ho et al.
    2020, eq. 5 and 13).

    Args:
        images, noisy: x_0 = k/127.5 - 1 and x_t, both (B, C, H, W); `timesteps` (B,).
        prediction: (B, C, H, W), of the scheduler's prediction type.
        predicted_variance: for learned_range, the UNet's other C channels, not clamped (Nichol 2021, eq. 15).
        variance_type: as in `PaperDDPMScheduler.reverse_log_variance`, which refuses others with a UserError.
        clip: clamp the predicted x_0 to [-1, 1], as the papers' scores do and their training does not.
        decoder: "tanh" or "exact", see `discretized_log_likelihood`.
    """
    nats = _nats_per_pixel(
        scheduler, images, noisy, timesteps, prediction, predicted_variance, variance_type, clip, decoder
    )
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _nats_per_pixel(
    scheduler, images, noisy, timesteps, prediction, predicted_variance, variance_type, clip, decoder
) -> Tensor:
    pred_original_sample = scheduler.predict_original_sample(prediction, noisy, timesteps)
    if clip:
        pred_original_sample = pred_original_sample.clamp(-1, 1)
    true_log_variance = scheduler.reverse_log_variance(noisy, timesteps, None, "fixed_small")
    log_variance = scheduler.reverse_log_variance(noisy, timesteps, None, variance_type, predicted_variance)
    # The two means share their part in x_t: their difference formed as one loses no digits where c_0 is small.
    coefficient_0 = scheduler.posterior_coefficients(timesteps)[0].to(noisy.dtype).view(-1, 1, 1, 1)
    mean_difference = coefficient_0 * (images - pred_original_sample)
    difference = true_log_variance - log_variance
    kl = 0.5 * (torch.expm1(difference) - difference + mean_difference**2 * torch.exp(-log_variance))
    # At t = 0 the posterior's mean is x_0.
    first = -discretized_log_likelihood(images, pred_original_sample, log_variance, decoder)
    return torch.where((timesteps == 0).view(-1, 1, 1, 1), first, kl)


def discretized_log_likelihood(images: Tensor, mean: Tensor, log_variance: Tensor, decoder: str = "tanh") -> Tensor:
    """Return the log-probability in nats of each 8-bit pixel under a Gaussian integrated over the pixel's bin.

    Ho et al. 2020, eq. 13. "tanh" approximates the normal CDF and has a floor of 1e-12, as the code that the published
    bits/dim were computed with; "exact" does neither. They differ by about 0.01 bits/dim at t = 0. All arguments
    (B, C, H, W), or to be broadcast to it; images are k/127.5 - 1. Another decoder is a UserError.
    """
    deviation, inverse_std = images - mean, torch.exp(-0.5 * log_variance)
    upper, lower = inverse_std * (deviation + 1 / 255), inverse_std * (deviation - 1 / 255)
    is_last, is_first = images > 0.999, images < -0.999  # these bins reach to infinity
    if decoder == "tanh":
        upper, lower = normal_cdf(upper), normal_cdf(lower)
        upper = torch.where(is_last, torch.ones_like(upper), upper)
        lower = torch.where(is_first, torch.zeros_like(lower), lower)
        return torch.log((upper - lower).clamp(min=FLOOR))
    if decoder != "exact":
        raise UserError(f"decoder is {decoder!r}; choose tanh or exact.")
    upper, lower = upper.masked_fill(is_last, math.inf), lower.masked_fill(is_first, -math.inf)
    # Right of the middle the difference is taken in the mirrored tail, where it keeps its digits.
    mirror = upper + lower > 0
    upper, lower = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper))


def normal_cdf(z: Tensor) -> Tensor:
    """Return the standard normal CDF by the tanh approximation of Ho's and Nichol's code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def prior_term(scheduler: PaperDDPMScheduler, images: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) per image (B,) in bits/dim, float64; images (B, C, H, W) in [-1, 1].

    Ho et al. 2020, eq. 5: what the schedule leaves of the image at its last timestep; no model can change it.
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
    num_evaluations: int,
    *,
    seed: int = 0,
    variance_type: str | None = None,  # None: the config's
    clip: bool = True,
    decoder: str = "tanh",
    batch_size: int = 64,
    dtype: torch.dtype = torch.float64,  # of all outside the UNet; float32 (all that MPS has) costs 1e-5 of a term
    class_labels: Tensor | None = None,  # (N,), for a conditional UNet
    on_step: Callable[[int, int], None] | None = None,  # called with (evaluations done, evaluations in all)
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield (rows, timesteps, weights, bits, floored) for batches of `evaluations`, each (row, timestep, weight).

    All five are (B,) on the CPU: `bits` float64 terms in bits/dim, `floored` the share of pixels whose probability is
    at the decoder's floor. `images` is uint8 (N, C, H, W) and `indices` their numbers in the data set: the noise of
    image i at t is keyed by (seed, i, t), so neither batch size nor the number of processes changes it. The UNet
    computes in its own dtype and is in eval mode while this runs. A batch mixes images and timesteps.

    Raises:
        UserError: if the images are not uint8, or variance_type learned_range meets a UNet without 2C outputs.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"images are {images.dtype}; the bound is on 8-bit images: give uint8 from 0 to 255.")
    variance_type = variance_type or scheduler.config.variance_type
    device, channels, evaluations = unet.device, images.shape[1], iter(evaluations)
    was_training, done = unet.training, 0
    unet.eval()
    try:
        with tqdm(desc="Bits/dim", total=num_evaluations, unit="evaluation", disable=not progress) as bar:
            while batch := list(islice(evaluations, batch_size)):
                rows, timesteps = (torch.tensor([pair[k] for pair in batch]) for k in (0, 1))
                weights = torch.tensor([weight for _, _, weight in batch], dtype=torch.float64)
                generators = [keyed_generator(seed, "bound", indices[row], t) for row, t, _ in batch]
                noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
                x0 = images[rows].to(device, dtype) / 127.5 - 1
                t = timesteps.to(device)
                noisy = scheduler.q_sample(x0, noise.to(device, dtype), t)
                labels = None if class_labels is None else class_labels[rows].to(device)
                prediction = unet(noisy.to(unet.dtype), t, class_labels=labels).sample.to(dtype)
                predicted_variance = None
                if prediction.shape[1] == 2 * channels:
                    prediction, predicted_variance = prediction.chunk(2, dim=1)
                nats = _nats_per_pixel(
                    scheduler, x0, noisy, t, prediction, predicted_variance, variance_type, clip, decoder
                )
                floored = (nats > -math.log(FLOOR) - 1e-4) & (t == 0).view(-1, 1, 1, 1) & (decoder == "tanh")
                bits = (nats.mean(dim=(1, 2, 3)) / math.log(2)).to("cpu", torch.float64)
                yield rows, timesteps, weights, bits, floored.to(dtype).mean(dim=(1, 2, 3)).to("cpu", torch.float64)
                bar.update(len(batch))
                done += len(batch)
                if on_step is not None:
                    on_step(done, num_evaluations)
    finally:
        unet.train(was_training)


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

    "bits_per_dim" is "L0" + "L1_to_last" (the sum over t = 1 .. T-1) + "prior"; "floored" is the share of pixels at
    the decoder's floor, and the number is no bound unless that is 0. One noise per image and t.

    Args:
        images, indices: uint8 (N, C, H, W), any share of a data set, and their numbers in it.
        num_timesteps: None for all T terms. K: L_0 and K - 1 draws of t > 0, one from each of K - 1 slices of equal
            probability, p_t proportional to sqrt(E[L_t^2]) (the importance sampling of Nichol & Dhariwal 2021, section
            3.3); a t that is drawn twice is evaluated once. Unbiased: its mean over the draws is the full bound.
        pilot: the p_t, from `pilot_probabilities`; None: from the first few images here.
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
        evaluations = [
            (row, t, weight)
            for row, index in enumerate(indices)
            for t, weight in [(0, 1.0), *_stratified_draws(pilot, num_timesteps - 1, seed, index)]
        ]
        count = len(evaluations)
    first, rest, floored = torch.zeros(3, num_images, dtype=torch.float64)
    for rows, timesteps, weights, bits, floored_share in bound_terms(
        unet, scheduler, images, indices, evaluations, count, seed=seed, **options
    ):
        is_first = timesteps == 0
        first.index_add_(0, rows, bits * is_first)
        rest.index_add_(0, rows, bits * weights * ~is_first)
        floored.index_add_(0, rows, floored_share)
    prior = prior_term(scheduler, images.double() / 127.5 - 1)
    return {
        "bits_per_dim": first + rest + prior,
        "L0": first,
        "L1_to_last": rest,
        "prior": prior,
        "floored": floored,
    }


def summarise(bounds: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of what `bits_per_dim` returned, and the total's standard error over images (nan for one).

    Results of several processes are concatenated before.
    """
    total = bounds["bits_per_dim"]
    means = {name: float(values.mean()) for name, values in bounds.items()}
    standard_error = float(total.std()) / math.sqrt(len(total)) if len(total) > 1 else math.nan
    return means | {"standard_error": standard_error, "num_images": len(total)}


def num_pilot_images(num_train_timesteps: int) -> int:
    """Return how many images `pilot_probabilities` is to see: from 1 to 64, all T timesteps of each."""
    return max(1, min(64, PILOT_EVALUATIONS // num_train_timesteps))


def pilot_probabilities(unet, scheduler, images, indices, **options) -> Tensor:
    """Return p_t (T,), float64, for `bits_per_dim` with few timesteps: 0 at t = 0, which is always evaluated.

    Arguments as `bound_terms`, all T timesteps of every image: 16 to 64 of them do.
    """
    T = scheduler.config.num_train_timesteps
    evaluations = ((row, t, 1.0) for row in range(len(images)) for t in range(T))
    squares = torch.zeros(T, dtype=torch.float64)
    for _, timesteps, _, bits, _ in bound_terms(
        unet, scheduler, images, indices, evaluations, len(images) * T, **options
    ):
        squares.index_add_(0, timesteps, bits**2)
    return torch.cat([torch.zeros(1, dtype=torch.float64), importance_probabilities(squares[1:])])


def importance_probabilities(second_moments: Tensor) -> Tensor:
    """Return p_t proportional to sqrt(E[L_t^2]), with 0.1 % of uniform mixed in so that none is 0.

    Nichol & Dhariwal 2021, eq. 18, and their code; `second_moments` (n,) up to a common factor.
    """
    p = second_moments.sqrt()
    return 0.999 * p / p.sum() + 0.001 / len(p)


def _stratified_draws(probabilities: Tensor, count: int, seed: int, index: int) -> list[tuple[int, float]]:
    """Pairs (t, weight): `count` draws, one from each of as many slices of equal probability, those alike as one."""
    uniform = torch.rand(count, dtype=torch.float64, generator=keyed_generator(seed, "bound timesteps", index))
    timesteps = draw_from(probabilities, (torch.arange(count) + uniform) / count)
    drawn, times = timesteps.unique(return_counts=True)
    return list(zip(drawn.tolist(), (times / (count * probabilities[drawn])).tolist()))


def draw_from(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the timesteps (B,) int64 that numbers in [0, 1), float64 (B,), draw from probabilities (T,)."""
    cumulative = probabilities.cumsum(0)
    # The last sum may be 1 - 1e-16, and a number above it belongs to the last timestep.
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(cumulative) - 1)
