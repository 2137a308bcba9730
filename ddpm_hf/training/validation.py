"""Measure the validation loss on held-out images, at fixed timesteps and with fixed noise."""

import torch

from ..diffusion.losses import NUM_BANDS, accuracy, by_band, draw_noise, training_labels
from ..randomness import keyed_generator
from .run import Run


VALIDATION_IMAGES = 1024  # enough for three digits of the loss; costs a few percent of an epoch


def validate(run: Run) -> dict:
    """Return the validation losses for the log line: the loss of the raw weights, and that of the EMA if there is one.

    A classifier also gets the accuracy of its published weights on the same noisy images.
    """
    line = {}
    measures = {"validation_loss": (run.network, run.loss)}
    if run.ema is not None:
        measures["validation_loss_ema"] = run.ema, run.loss
    if run.config.objective == "classify":
        measures["validation_accuracy"] = run.published, accuracy(run.scheduler)
    for name, (network, measure) in measures.items():
        sums, counts = validation_loss(run, network, measure)
        line[name] = mean(sums, counts)
        line[f"{name}_by_band"] = per_band(sums, counts)
    return line


@torch.no_grad()
def validation_loss(run: Run, network, measure) -> torch.Tensor:
    """Measure up to 1,024 held-out images with `measure(network, batch)`, which returns one number per image.

    Return (2, 4): the sum of these numbers and the count of images, in each quarter of the timesteps. Each image has
    its own fixed noise and timestep, and the timesteps are spread evenly. The losses of two runs, or of two epochs,
    thus differ only because of the weights. Every process measures a share of the images. A conditional UNet gets the
    class of each image. A classifier is measured only on images that have a class.
    """
    config, accelerator, image_set = run.config, run.accelerator, run.validation_set
    rows = torch.arange(len(image_set))
    if config.objective == "classify":
        rows = rows[image_set.labels >= 0]
    count = min(len(rows), VALIDATION_IMAGES)
    rows = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
    spread = (torch.randperm(count, generator=keyed_generator(0, "validation")) + 0.5) / count
    sums = torch.zeros(2, NUM_BANDS, device=accelerator.device)
    was_training = network.training
    network.eval()
    share = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    for ordinals in share.split(config.train_batch_size) if len(share) else ():
        images = image_set.get(rows[ordinals].tolist())
        noise, _ = draw_noise(ordinals, images.shape[1:], config.ddpm_num_steps, seed=-1)
        timesteps = (spread[ordinals] * config.ddpm_num_steps).long()
        batch = {"images": images, "noise": noise, "timesteps": timesteps}
        if image_set.labels is not None:
            batch["labels"] = image_set.labels[rows[ordinals]]
        if config.class_conditional:
            batch["class_labels"] = training_labels(batch["labels"], ordinals, len(image_set.class_names), 0.0, 0)
        elif config.augment_probability:
            batch["class_labels"] = torch.zeros(len(ordinals), dtype=torch.int64)  # images as they are
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            losses = measure(network, batch)
        sums += by_band(losses, batch["timesteps"], config.ddpm_num_steps)
    network.train(was_training)
    return accelerator.reduce(sums, "sum").cpu()


def mean(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Return the mean loss over all timesteps; None without images."""
    return float(sums.sum() / counts.sum()) if counts.sum() > 0 else None


def per_band(sums: torch.Tensor, counts: torch.Tensor) -> list[float | None]:
    """Return the mean loss of each quarter of the timesteps; None for a quarter without images."""
    return [float(s / n) if n else None for s, n in zip(sums, counts)]
