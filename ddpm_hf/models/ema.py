"""The moving average of the weights."""

import torch
from diffusers import UNet2DModel
from torch.optim.swa_utils import AveragedModel


def ema_decay(config, updates: int) -> float:
    """Return the decay of the update after `updates` earlier ones: 1 - (1 + updates/inv_gamma)^-power, at most max.

    The first update copies the weights, as Ho's and diffusers' do. With an inv_gamma of 0 the rest have the maximum.
    """
    if updates == 0:
        return 0.0
    if config.ema_inv_gamma == 0:
        return config.ema_max_decay
    return min(config.ema_max_decay, 1 - (1 + updates / config.ema_inv_gamma) ** -config.ema_power)


def make_ema(config, unet: UNet2DModel) -> AveragedModel | None:
    """Return the moving average that --use_ema asks for; its `.module` is a UNet2DModel to sample from and to save."""
    if not config.use_ema:
        return None

    def average(ema_parameters, parameters, updates):
        torch._foreach_lerp_(ema_parameters, parameters, 1 - ema_decay(config, int(updates)))

    ema = AveragedModel(unet, multi_avg_fn=average)
    ema.module.eval().requires_grad_(False)
    return ema
