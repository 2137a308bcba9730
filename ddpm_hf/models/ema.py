"""Keep a moving average of the weights (EMA)."""

import torch
from diffusers import UNet2DModel
from torch.optim.swa_utils import AveragedModel


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


def make_ema(config, unet: UNet2DModel) -> AveragedModel | None:
    """Return the moving average of `unet`, or None without --use_ema. Its `.module` is a network like `unet`."""
    if not config.use_ema:
        return None

    def average(ema_parameters, parameters, updates):
        torch._foreach_lerp_(ema_parameters, parameters, 1 - ema_decay(config, int(updates)))

    ema = AveragedModel(unet, multi_avg_fn=average)
    ema.module.eval().requires_grad_(False)
    return ema
