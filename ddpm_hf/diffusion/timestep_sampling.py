"""Which timestep an image is taught: uniform, or the costly ones more often ("loss second moment").

Importance sampling of Nichol & Dhariwal 2021, section 3.3: p_t is proportional to sqrt(E[L_t^2]) over the last ten
losses of each t, an image weighs 1/(T p_t), and until every t has ten, p_t is uniform. The history is a plain tensor
(T, 10), the newest loss last and NaN where there is none yet; it lies in the checkpoint.

The timestep of image number n is drawn by the number in [0, 1) keyed by (seed, n): batch size, accumulation and
processes change it through the history alone, that is by the round-off of losses. The history moves once per optimizer
step, by all losses of the step in the order of their ordinals.
"""

import torch
from torch import Tensor

from ..randomness import keyed_generator
from .likelihood import draw_from, importance_probabilities


HISTORY = 10  # losses per timestep, of Nichol & Dhariwal


def new_history(num_train_timesteps: int) -> Tensor:
    """Return the history (T, 10), float64, of a run that has seen no loss."""
    return torch.full((num_train_timesteps, HISTORY), torch.nan, dtype=torch.float64)


def timestep_probabilities(history: Tensor) -> Tensor:
    """Return p_t (T,), float64: 0.1 % uniform, the rest by the history (T, 10); all uniform while it has gaps."""
    if history.isnan().any():
        return torch.full((len(history),), 1 / len(history), dtype=torch.float64)
    return importance_probabilities(history.square().mean(dim=1))


def draw_timesteps(history: Tensor, ordinals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) int64 and weights 1/(T p_t) (B,) float32 of the images numbered `ordinals` (B,)."""
    probabilities = timestep_probabilities(history)
    uniform = [torch.rand((), dtype=torch.float64, generator=keyed_generator(seed, "t", n)) for n in ordinals.tolist()]
    timesteps = draw_from(probabilities, torch.stack(uniform))
    return timesteps, (1 / (len(history) * probabilities[timesteps])).float()


def remember(history: Tensor, ordinals: Tensor, timesteps: Tensor, losses: Tensor):
    """Move the history (T, 10) on, in place, by the losses (B,) of one optimizer step, the lowest ordinal first."""
    order = ordinals.argsort()
    for t, loss in zip(timesteps[order].tolist(), losses[order].tolist()):
        history[t] = torch.cat([history[t, 1:], history.new_tensor([loss])])
