"""The validation loss: held-out images at fixed timesteps, with fixed noise."""

import torch

from ..diffusion.losses import NUM_BANDS, accuracy, by_band, draw_noise, told_labels
from ..randomness import keyed_generator
from .run import Run


VALIDATION_IMAGES = 1024  # enough for three digits, and a few percent of the cost of an epoch


@torch.no_grad()
def validation_loss(
    model, loss, image_set, num_train_timesteps: int, batch_size: int, accelerator, class_conditional: bool = False
) -> torch.Tensor:
    """Return (2, 4), as `by_band`: the loss on at most 1,024 held-out images, each with its own fixed t and noise.

    The timesteps are spread evenly, so that two runs, or two epochs of one, differ only by their weights. Every
    process takes its share. A conditional UNet is told every class.
    """
    count = min(len(image_set), VALIDATION_IMAGES)
    rows = torch.linspace(0, len(image_set) - 1, count).round().long()
    spread = (torch.randperm(count, generator=keyed_generator(0, "validation")) + 0.5) / count
    sums = torch.zeros(2, NUM_BANDS, device=accelerator.device)
    training = model.training
    model.eval()
    share = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    for ordinals in share.split(batch_size):
        images = image_set.get(rows[ordinals].tolist())
        noise, _ = draw_noise(ordinals, images.shape[1:], num_train_timesteps, seed=-1)
        timesteps = (spread[ordinals] * num_train_timesteps).long()
        batch = {"images": images, "noise": noise, "timesteps": timesteps}
        if image_set.labels is not None:
            batch["labels"] = image_set.labels[rows[ordinals]]
        if class_conditional:
            batch["class_labels"] = told_labels(batch["labels"], ordinals, len(image_set.class_names), 0.0, 0)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            losses = loss(model, batch)
        sums += by_band(losses, batch["timesteps"], num_train_timesteps)
    model.train(training)
    return accelerator.reduce(sums, "sum").cpu()


def per_band(sums, counts) -> list[float | None]:
    return [float(s / n) if n else None for s, n in zip(sums, counts)]


def validate(run: Run) -> dict:
    """Return the validation loss of the raw weights and of their moving average, where there is one; of a classifier
    also its accuracy on the noisy images, by published weights."""
    config, line = run.config, {}
    measures = {"validation_loss": (run.network, run.loss)}
    if run.ema is not None:
        measures["validation_loss_ema"] = run.ema.module, run.loss
    if config.objective == "classify":
        measures["validation_accuracy"] = run.published, accuracy(run.scheduler)
    for name, (network, measure) in measures.items():
        sums, counts = validation_loss(
            network,
            measure,
            run.validation_set,
            config.ddpm_num_steps,
            config.train_batch_size,
            run.accelerator,
            config.class_conditional,
        )
        line[name] = float(sums.sum() / counts.sum())
        line[f"{name}_by_band"] = per_band(sums, counts)
    return line
