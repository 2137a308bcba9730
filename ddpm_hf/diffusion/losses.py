"""Define the losses to train with, one function each in OBJECTIVES, and draw the noise and labels that they need.

A loss is a callable `(model, batch) -> float32 (B,)`, one number per image. A batch is a dict of tensors on the
model's device: "images" (B, C, H, W) in [-1, 1], "noise" of the same shape and "timesteps" (B,) int64 in [0, T). Data
with classes adds "labels" (B,) int64, -1 for "no class". For a conditional UNet the batch also has "class_labels", see
`training_labels`.

Only the network runs under autocast. Everything else is float32. In bfloat16, `1 - abar` would round to 0 for the
first ten timesteps.
"""

import torch
import torch.nn.functional as F

from ..randomness import keyed_generator
from .likelihood import variational_term
from .scheduler import PaperDDPMScheduler


NUM_BANDS = 4  # losses are logged for each quarter of the timesteps
DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}  # huber: with torch's beta 1


def simple_loss(scheduler: PaperDDPMScheduler, *, loss_type: str = "l2", snr_gamma: float | None = None):
    """Return the loss L_simple (Ho et al. 2020, eq. 14): the distance of prediction and target, averaged over pixels.

    Args:
        loss_type: "l2", "l1" or "huber". "huber" is smooth L1 with beta 1: half the squared error for errors below 1,
            which most errors of eps are. It is not the pseudo-Huber loss of diffusers' scripts.
        snr_gamma: use Min-SNR weights with this gamma (Hang et al. 2023, https://huggingface.co/papers/2303.09556).
            None: no weights. If the UNet predicts x_0, diffusers' train_unconditional.py weights the squared error by
            the SNR. A gamma above every SNR, e.g. 1e9, does the same.
    """

    def loss(model, batch):
        _, prediction, _ = predict(scheduler, model, batch)
        return prediction_error(scheduler, batch, prediction, loss_type, snr_gamma)

    return loss


def hybrid_loss(scheduler: PaperDDPMScheduler, *, loss_type: str = "l2", snr_gamma: float | None = None):
    """Return the loss L_hybrid (Nichol & Dhariwal 2021, eq. 16): `simple_loss` plus 0.001 times the variational bound.

    In the bound, the mean is detached, so the bound trains only the variance.
    """

    def loss(model, batch):
        noisy, prediction, variance = predict(scheduler, model, batch)
        # L_vlb is a sum over t, so T times the term of one random t estimates it.
        bound = bound_term(scheduler, batch, noisy, prediction.detach(), variance)
        return prediction_error(scheduler, batch, prediction, loss_type, snr_gamma) + 0.001 * len(scheduler) * bound

    return loss


def vlb_loss(scheduler: PaperDDPMScheduler, *, loss_type: str = "l2", snr_gamma: float | None = None):
    """Return a loss that estimates the variational bound in bits per dimension: T times the term of one timestep.

    `loss_type` and `snr_gamma` are not used, because a bound fixes the distance and the weights. TrainingConfig
    refuses them for this objective.
    """

    def loss(model, batch):
        noisy, prediction, variance = predict(scheduler, model, batch)
        return len(scheduler) * bound_term(scheduler, batch, noisy, prediction, variance)

    return loss


def classification_loss(scheduler: PaperDDPMScheduler, *, loss_type: str = "l2", snr_gamma: float | None = None):
    """Return the loss of a classifier p(y | x_t, t): the cross-entropy in nats, and 0 for images without a class.

    Guidance uses the classifier at all noise levels, so it is trained at all of them (Dhariwal & Nichol 2021,
    section 4). `loss_type` and `snr_gamma` are not used. TrainingConfig refuses them for this objective.
    """

    def loss(model, batch):
        noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
        logits = model(noisy, batch["timesteps"]).float()
        return F.cross_entropy(logits, batch["labels"], ignore_index=-1, reduction="none")

    return loss


# By --objective: `(scheduler, *, loss_type, snr_gamma) -> loss`. "classify" trains a classifier, all others a UNet.
OBJECTIVES = {"simple": simple_loss, "hybrid": hybrid_loss, "vlb": vlb_loss, "classify": classification_loss}


def predict(scheduler: PaperDDPMScheduler, model, batch: dict):
    """Return x_t, the UNet's prediction and the UNet's variance output (None if it is fixed), all (B, C, H, W)."""
    noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
    output = model(noisy, batch["timesteps"], batch.get("class_labels")).sample.float()
    if scheduler.config.variance_type == "learned_range":
        return noisy, *output.chunk(2, dim=1)
    return noisy, output, None


def prediction_error(
    scheduler: PaperDDPMScheduler, batch: dict, prediction: torch.Tensor, loss_type: str, snr_gamma: float | None
) -> torch.Tensor:
    """Return the distance (B,) between the prediction and the scheduler's target, weighted if `snr_gamma` is given."""
    target = scheduler.training_target(batch["images"], batch["noise"], batch["timesteps"])
    losses = DISTANCES[loss_type](prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weights(scheduler, batch["timesteps"], snr_gamma)
    return losses


def bound_term(
    scheduler: PaperDDPMScheduler,
    batch: dict,
    noisy: torch.Tensor,
    prediction: torch.Tensor,
    variance: torch.Tensor | None,
) -> torch.Tensor:
    """Return the term of the variational bound at each image's timestep, (B,) in bits per dimension."""
    return variational_term(
        scheduler,
        batch["images"],
        noisy,
        batch["timesteps"],
        prediction,
        predicted_variance=variance,
        variance_type=scheduler.config.variance_type,
    )


def accuracy(scheduler: PaperDDPMScheduler):
    """Return a function `(model, batch) -> (B,)`: 1.0 for each image that the classifier gets right, else 0.0."""

    def right(model, batch):
        noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
        return (model(noisy, batch["timesteps"]).argmax(dim=1) == batch["labels"]).float()

    return right


def training_labels(labels, ordinals, num_classes: int, dropout: float, seed: int) -> torch.Tensor:
    """Return the labels (B,) with which to train a conditional UNet: the class, or `num_classes` for "no class".

    Unlabelled images, and a random share `dropout` of all images, get the label "no class". One UNet thus learns to
    predict with and without a class (Ho & Salimans 2022, Algorithm 1). The draw for an image is keyed by
    (seed, ordinal).
    """
    draws = [torch.rand((), generator=keyed_generator(seed, "label", n)) for n in ordinals.tolist()]
    return labels.masked_fill((torch.stack(draws) < dropout) | (labels < 0), num_classes)


def min_snr_weights(scheduler: PaperDDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the Min-SNR weight (B,) of each timestep for the scheduler's prediction type.

    The squared error of x_0 has the weight min(SNR, gamma). The squared error of epsilon is SNR times that of x_0, so
    its weight is divided by SNR. The squared error of v is SNR + 1 times that of x_0.
    """
    snr = scheduler.snr(timesteps).float()
    in_x0 = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[scheduler.config.prediction_type]
    return snr.clamp(max=gamma) / in_x0


def draw_noise(ordinals: torch.Tensor, shape, num_train_timesteps: int, seed: int):
    """Return noise (B, *shape) and timesteps (B,) int64 for the images with these `ordinals`.

    Each draw is keyed by (seed, ordinal), so batch size, processes, accumulation and resuming do not change the draws.
    """
    noise = torch.empty(len(ordinals), *shape)
    timesteps = torch.empty(len(ordinals), dtype=torch.int64)
    for row, ordinal in enumerate(ordinals.tolist()):
        generator = keyed_generator(seed, "noise", ordinal)
        timesteps[row] = torch.randint(num_train_timesteps, (), generator=generator)
        torch.randn(shape, generator=generator, out=noise[row])
    return noise, timesteps


def by_band(losses: torch.Tensor, timesteps: torch.Tensor, num_train_timesteps: int, weights=1.0) -> torch.Tensor:
    """Return (2, 4): the sum of the losses and the count of images in each quarter of the timesteps.

    With the `weights` (B,) of importance sampling, return the sum of the weighted losses and the sum of the weights.
    The ratio of the two sums then estimates the mean loss under uniform timesteps.
    """
    band = timesteps * NUM_BANDS // num_train_timesteps
    sums = torch.zeros(2, NUM_BANDS, device=losses.device)
    return sums.index_add_(1, band, torch.stack([losses.float(), torch.ones_like(losses)]) * weights)
