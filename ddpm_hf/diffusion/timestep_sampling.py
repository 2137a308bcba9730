"""Draw the timesteps of the training images for --timestep_sampling low_discrepancy and loss_second_moment.

low_discrepancy spreads the timesteps evenly over a batch: see `spread_timesteps`. The other functions are for
loss_second_moment, which draws timesteps with large losses more often. This is the importance sampling of Nichol &
Dhariwal 2021, section 3.3. p_t is proportional to sqrt(E[L_t^2]) over the last ten losses of each t, and an image has
the weight 1/(T p_t). Until every t has ten losses, p_t is uniform. The history of losses is a tensor (T, 10) with the
newest loss last, and NaN for missing losses. Checkpoints save the history. It stays on the GPU, because the GPU would
have to wait if the CPU read the losses.

With loss_second_moment, the timestep of image n is drawn with a random number in [0, 1) that is keyed by (seed, n).
Batch size, accumulation and processes therefore change a timestep only through round-off in the losses of the history.
The history is updated once per optimizer step, with all losses of the step in the order of their ordinals.
"""

import torch
from torch import Tensor

from ..randomness import keyed_generator
from .likelihood import draw_from, importance_probabilities


HISTORY = 10  # losses per timestep, as in Nichol & Dhariwal


def new_history(num_train_timesteps: int) -> Tensor:
    """Return the empty history (T, 10), float64, of a new run."""
    return torch.full((num_train_timesteps, HISTORY), torch.nan, dtype=torch.float64)


def timestep_probabilities(history: Tensor) -> Tensor:
    """Return p_t (T,), float64, from the history (T, 10). It is uniform while losses are missing in the history."""
    # Choose with `where`, because an `if` would make a GPU wait.
    importance = importance_probabilities(history.square().mean(dim=1))
    return importance.where(~history.isnan().any(), 1 / len(history))


def spread_timesteps(ordinals: Tensor, num_train_timesteps: int, seed: int) -> Tensor:
    """Return timesteps (B,) int64 that are spread evenly over every run of consecutive images.

    The timestep of image n is floor(T ((u + n phi) mod 1)), where phi is the golden ratio and u is a random number in
    [0, 1) for the whole run. Each timestep is uniform. But every batch has small and large timesteps, so its mean loss
    varies less. The low-discrepancy sampler of Kingma et al. 2021 (Variational Diffusion Models, appendix I.1) has the
    same aim. There, image i of a batch uses (u + i / B) mod 1. Here, nothing depends on the batch.
    """
    phi = (5**0.5 - 1) / 2  # the golden ratio without its whole part
    u = torch.rand((), dtype=torch.float64, generator=keyed_generator(seed, "timesteps"))
    return ((u + ordinals.double() * phi) % 1 * num_train_timesteps).long()


def draw_uniform(ordinals: Tensor, seed: int) -> Tensor:
    """Return a random number in [0, 1) for each of the images with these `ordinals` (B,): float64 (B,)."""
    generators = [keyed_generator(seed, "t", n) for n in ordinals.tolist()]
    return torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])


def draw_timesteps(history: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) int64 and weights 1/(T p_t), float32 (B,), for the numbers of `draw_uniform` (B,)."""
    probabilities = timestep_probabilities(history)
    timesteps = draw_from(probabilities, uniform.to(history.device, non_blocking=True))
    return timesteps, (1 / (len(history) * probabilities[timesteps])).float()


def update_history(history: Tensor, ordinals: Tensor, timesteps: Tensor, losses: Tensor):
    """Add the losses (B,) of one optimizer step to the history (T, 10) in place, in the order of their ordinals."""
    ordinals, timesteps, losses = (values.to(history.device) for values in (ordinals, timesteps, losses))
    # Sort by timestep, and for each timestep by ordinal.
    order = ordinals.argsort()
    order = order[timesteps[order].argsort(stable=True)]
    timesteps, losses = timesteps[order], losses[order].to(history.dtype)
    # `age` is how many losses of the same timestep follow. The newest has age 0, and goes into the last column.
    counts = torch.zeros(len(history), dtype=torch.int64, device=history.device)
    counts.index_add_(0, timesteps, torch.ones_like(timesteps))
    age = counts.cumsum(0)[timesteps] - 1 - torch.arange(len(timesteps), device=history.device)
    # Move the losses of each timestep to the left by the number of its new losses.
    columns = torch.arange(HISTORY, device=history.device) + counts[:, None]
    history.copy_(history.gather(1, columns.clamp(max=HISTORY - 1)))
    # Write the new losses. An extra first column takes those that are already too old, because selecting the others
    # would make a GPU wait.
    table = torch.nn.functional.pad(history, (1, 0))
    table[timesteps, (HISTORY - age).clamp(min=0)] = losses
    history.copy_(table[:, 1:])
