"""Draw the timestep of each training image: uniformly, or costly timesteps more often ("loss second moment").

This is the importance sampling of Nichol & Dhariwal 2021, section 3.3: p_t is proportional to sqrt(E[L_t^2]) over the
last ten losses of each t, and an image weighs 1/(T p_t). p_t is uniform until every t has ten losses. The history of
losses is a tensor (T, 10), newest last, NaN where there is none yet; a checkpoint saves it.

The timestep of image n is drawn with the number in [0, 1) keyed by (seed, n). Batch size, accumulation and processes
therefore change it only through the history, by the round-off of losses. The history is updated once per optimizer
step, with all losses of the step in the order of their ordinals.
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
    """Return p_t (T,), float64, from the history (T, 10); uniform while the history has gaps."""
    if history.isnan().any():
        return torch.full((len(history),), 1 / len(history), dtype=torch.float64)
    return importance_probabilities(history.square().mean(dim=1))


def draw_timesteps(history: Tensor, ordinals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) int64 and weights 1/(T p_t) (B,) float32 for the images numbered `ordinals` (B,)."""
    probabilities = timestep_probabilities(history)
    uniform = [torch.rand((), dtype=torch.float64, generator=keyed_generator(seed, "t", n)) for n in ordinals.tolist()]
    timesteps = draw_from(probabilities, torch.stack(uniform))
    return timesteps, (1 / (len(history) * probabilities[timesteps])).float()


def update_history(history: Tensor, ordinals: Tensor, timesteps: Tensor, losses: Tensor):
    """Add the losses (B,) of one optimizer step to the history (T, 10), in place, the lowest ordinal first."""
    order = ordinals.argsort()
    for t, loss in zip(timesteps[order].tolist(), losses[order].tolist()):
        history[t] = torch.cat([history[t, 1:], history.new_tensor([loss])])
