"""Draw the batches of a run ahead of its steps, so that a step only computes."""

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ..data.batches import training_batches
from ..diffusion.losses import draw_noise, training_labels
from ..diffusion.timestep_sampling import draw_uniform, spread_timesteps
from ..models.augmented import labels_with_augmentation


AHEAD = 2  # batches that are drawn before they are needed


class Batch(NamedTuple):
    """The input of one forward pass.

    Attributes:
        tensors: the batch that a loss takes (see losses.py), on the device of the run, and the "ordinals" (B,) of its
            images. The batch of a classifier also has "weights" (B,): 0 for images without a class, else 1.
        uniform: the random numbers (B,) that `draw_uniform` returns. None without --timestep_sampling
            loss_second_moment.
        dropout_seed: the seed of the dropout masks.
        stream: the position in a streamed dataset after this batch; None for other data.
    """

    tensors: dict[str, torch.Tensor]
    uniform: torch.Tensor | None
    dropout_seed: int
    stream: dict | None


def draw_batches(run) -> Iterator[Batch]:
    """Yield the next batches of this process, without end.

    A thread draws the batches ahead. This does not change them, because each random number depends only on the seed
    and on the ordinal of an image. Closing the iterator stops the thread.

    Raises:
        UserError: for an image that cannot be read, when its batch is due.
    """
    config, accelerator = run.config, run.accelerator
    device, on_gpu = accelerator.device, accelerator.device.type == "cuda"
    batches = training_batches(
        run.train_set,
        config,
        run.state.images_seen,
        accelerator.process_index,
        accelerator.num_processes,
        complete=functools.partial(
            add_draws,
            config=config,
            class_names=run.class_names,
            num_embeddings=run.network.config.get("num_class_embeds"),
        ),
        pin_memory=on_gpu,
    )
    thread = ThreadPoolExecutor(1, "batches")
    try:
        threads = torch.get_num_threads()
        thread.submit(prepare_thread, device).result()
        torch.set_num_threads(threads)  # else threads that start later would get the number that prepare_thread set
        ahead = deque(thread.submit(next, batches) for _ in range(AHEAD))
        while True:
            batch = ahead.popleft().result()
            ahead.append(thread.submit(next, batches))
            others = batch.pop("uniform", None), batch.pop("dropout_seed"), batch.pop("position", None)
            # Copy while the GPU computes. Pinned memory makes that possible.
            tensors = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            yield Batch(tensors, *others)
    finally:
        thread.shutdown(cancel_futures=True)


def prepare_thread(device: torch.device):
    """Prepare the thread that draws batches: limit it to one core, and set its GPU. The thread itself calls this."""
    torch.get_num_threads()  # the first use of torch in a thread sets the number, so the next line must come later
    torch.set_num_threads(1)  # leave the other cores to the step
    if device.index is not None and device.type == "cuda":  # the device of a single process has no index
        torch.cuda.set_device(device)  # else a new thread uses the first GPU to pin memory


def add_draws(batch: dict, config, class_names: list[str] | None, num_embeddings: int | None) -> dict:
    """Return a batch with the noise, timestep and label of each image, and with the seed of the dropout masks."""
    ordinals, shape = batch["ordinals"], batch["images"].shape[1:]
    batch["noise"], batch["timesteps"] = draw_noise(ordinals, shape, config.ddpm_num_steps, config.seed)
    if config.timestep_sampling == "low_discrepancy":
        batch["timesteps"] = spread_timesteps(ordinals, config.ddpm_num_steps, config.seed)
    if config.timestep_sampling == "loss_second_moment":
        batch["uniform"] = draw_uniform(ordinals, config.seed)
    if config.class_conditional:
        batch["class_labels"] = training_labels(
            batch["labels"], ordinals, len(class_names), config.label_dropout, config.seed
        )
    if config.objective == "classify":
        batch["weights"] = (batch["labels"] >= 0).float()  # leave images without a class out of the loss
    if config.augment_probability:
        augmented = batch.pop("augmented")
        batch["class_labels"] = labels_with_augmentation(batch.get("class_labels"), augmented, num_embeddings)
    return batch | {"dropout_seed": config.seed + int(ordinals[0])}
