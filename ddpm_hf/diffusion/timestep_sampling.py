"""Draw the timestep of each training image: timesteps with large losses are drawn more often ("loss second moment").

This is the importance sampling of Nichol & Dhariwal 2021, section 3.3. p_t is proportional to sqrt(E[L_t^2]) over the
last ten losses of each t, and an image has the weight 1/(T p_t). Until every t has ten losses, p_t is uniform. The
history of losses is a tensor (T, 10) with the newest loss last, and NaN for missing losses. Checkpoints save it.

The timestep of image n is drawn with a random number in [0, 1) that is keyed by (seed, n). Batch size, accumulation
and processes therefore change a timestep only through round-off in the losses of the history. The history is updated
once per optimizer step, with all losses of the step in the order of their ordinals.
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
    if history.isnan().any():
        return torch.full((len(history),), 1 / len(history), dtype=torch.float64)
    return importance_probabilities(history.square().mean(dim=1))


def draw_timesteps(history: Tensor, ordinals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) int64 and weights 1/(T p_t), float32 (B,), for the images with these `ordinals` (B,)."""
    probabilities = timestep_probabilities(history)
    uniform = [torch.rand((), dtype=torch.float64, generator=keyed_generator(seed, "t", n)) for n in ordinals.tolist()]
    timesteps = draw_from(probabilities, torch.stack(uniform))
    return timesteps, (1 / (len(history) * probabilities[timesteps])).float()


def update_history(history: Tensor, ordinals: Tensor, timesteps: Tensor, losses: Tensor):
    """Add the losses (B,) of one optimizer step to the history (T, 10) in place, in the order of their ordinals."""
    order = ordinals.argsort()
    for t, loss in zip(timesteps[order].tolist(), losses[order].tolist()):
        history[t] = torch.cat([history[t, 1:], history.new_tensor([loss])])
