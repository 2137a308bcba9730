"""Keep a moving average of the weights (EMA)."""

import copy

import torch


def ema_decay(config, updates: int) -> float:
    """Return the decay of the next update of the average, when `updates` updates are already done.

    The decay is 1 - (1 + updates / inv_gamma)^-power, as in diffusers' EMAModel, but at most --ema_max_decay. The
    first update copies the weights (decay 0), as in Ho's and diffusers' code. If --ema_inv_gamma is 0, every later
    update has the decay --ema_max_decay.
    """
    if updates == 0:
        return 0.0
    if config.ema_inv_gamma == 0:
        return config.ema_max_decay
    return min(config.ema_max_decay, 1 - (1 + updates / config.ema_inv_gamma) ** -config.ema_power)


def make_ema(config, network: torch.nn.Module) -> torch.nn.Module | None:
    """Return a copy of `network` that holds the moving average of its weights, or None without --use_ema."""
    return copy.deepcopy(network).eval().requires_grad_(False) if config.use_ema else None


@torch.no_grad()
def update_ema(ema: torch.nn.Module, network: torch.nn.Module, decay: float):
    """Update the moving average in place: its weights become decay * average + (1 - decay) * weights of `network`."""
    # The decay is a Python number, because reading a tensor would make a GPU wait.
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
