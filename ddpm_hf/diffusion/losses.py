"""What a batch costs: a loss is a callable `(model, batch) -> float32 (B,)`, one number per image.

A batch is a dict: "images" (B, C, H, W) in [-1, 1], "noise" like it, "timesteps" (B,) int64 in [0, T), where the
data has classes "labels" (B,) int64, -1 for none, and "class_labels", those that a conditional UNet is told, all on
the model's device. Everything outside the network is float32 whatever the autocast: in bfloat16, 1 - abar rounds to 0
for the first ten timesteps.
"""

import torch
import torch.nn.functional as F

from ..randomness import keyed_generator
from .likelihood import variational_term
from .scheduler import PaperDDPMScheduler


NUM_BANDS = 4  # losses are told apart by quarter of the timesteps
DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


def denoising_loss(
    scheduler: PaperDDPMScheduler,
    loss_type: str = "l2",
    snr_gamma: float | None = None,
    objective: str = "simple",
):
    """Return the loss of an objective, for the scheduler's prediction type and variance.

    Args:
        objective: "simple", Ho et al. eq. 14; "hybrid", Nichol eq. 16, which adds the bound to teach a learned
            variance; "vlb", the variational bound itself in bits/dim, one of its T terms times T.
        loss_type: "l2", "l1" or "huber", the distance between prediction and target, averaged over pixels.
        snr_gamma: weigh each image by Min-SNR with this gamma (Hang et al. 2023, https://huggingface.co/papers/2303.09556).
    """
    T, variance_type = scheduler.config.num_train_timesteps, scheduler.config.variance_type

    def loss(model, batch):
        images, noise, timesteps = batch["images"], batch["noise"], batch["timesteps"]
        noisy = scheduler.q_sample(images, noise, timesteps)
        output = model(noisy, timesteps, batch.get("class_labels")).sample.float()
        prediction, variance = output.chunk(2, dim=1) if variance_type == "learned_range" else (output, None)
        if objective == "vlb":
            return T * variational_term(
                scheduler, images, noisy, timesteps, prediction, variance, variance_type=variance_type
            )
        target = scheduler.training_target(images, noise, timesteps)
        losses = DISTANCES[loss_type](prediction, target, reduction="none").mean(dim=(1, 2, 3))
        if snr_gamma is not None:
            losses = losses * min_snr_weights(scheduler, timesteps, snr_gamma)
        if objective == "hybrid":
            # L_hybrid = L_simple + 0.001 L_vlb (Nichol eq. 16). L_vlb sums over t, so its estimate by one t is T times
            # that term: 0.001 T. The mean is detached: the bound teaches only the variance.
            bound = variational_term(
                scheduler, images, noisy, timesteps, prediction.detach(), variance, variance_type=variance_type
            )
            losses = losses + 0.001 * T * bound
        return losses

    return loss


def classification_loss(scheduler: PaperDDPMScheduler):
    """Return the loss of a classifier p(y | x_t, t): its cross-entropy in nats, 0 for images without a class.

    Taught at all noise levels, for it will be asked at all of them (Dhariwal & Nichol 2021, section 4).
    """

    def loss(model, batch):
        noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
        logits = model(noisy, batch["timesteps"]).float()
        return F.cross_entropy(logits, batch["labels"], ignore_index=-1, reduction="none")

    return loss


def accuracy(scheduler: PaperDDPMScheduler):
    """Return what says of each image whether a classifier is right (1.0 or 0.0), called as a loss is."""

    def right(model, batch):
        noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
        return (model(noisy, batch["timesteps"]).argmax(dim=1) == batch["labels"]).float()

    return right


def told_labels(labels, ordinals, num_classes: int, dropout: float, seed: int) -> torch.Tensor:
    """Return the labels (B,) that a conditional UNet is told: `num_classes` is "no class".

    That is what images have that have none, and the share `dropout` of all, each by its (seed, ordinal): so one UNet
    learns the conditional and the unconditional noise (Ho & Salimans 2022, Algorithm 1).
    """
    draws = [torch.rand((), generator=keyed_generator(seed, "label", n)) for n in ordinals.tolist()]
    return labels.masked_fill((torch.stack(draws) < dropout) | (labels < 0), num_classes)


def min_snr_weights(scheduler: PaperDDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the Min-SNR weight (B,) of each timestep: min(SNR, gamma) in the space of x_0, per prediction type.

    A squared error of epsilon counts 1/SNR of it in x_0, one of v 1/(SNR + 1).
    """
    snr = scheduler.snr(timesteps).float()
    in_x0 = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[scheduler.config.prediction_type]
    return snr.clamp(max=gamma) / in_x0


def draw_noise(ordinals: torch.Tensor, shape, num_train_timesteps: int, seed: int):
    """Return noise (B, *shape) and timesteps (B,) int64, those of image number `ordinal` keyed by (seed, ordinal).

    What the n-th image of a run is taught thus depends on neither batch size, processes, accumulation nor resuming.
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

    With `weights` (B,), those of importance sampling, sums of weighted losses and of weights: their ratio is what it
    would be for uniform timesteps.
    """
    band = timesteps * NUM_BANDS // num_train_timesteps
    sums = torch.zeros(2, NUM_BANDS, device=losses.device)
    return sums.index_add_(1, band, torch.stack([losses.float(), torch.ones_like(losses)]) * weights)
