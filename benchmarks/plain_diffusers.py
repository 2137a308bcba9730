"""Train with the plain loop of diffusers' unconditional example, for comparison.

It has PIL transforms in the loader, float32 by default, no compilation, and AdamW. After every step it updates
diffusers' EMA and reads the loss. The code is written from the example's documentation. PIL replaces
torchvision's transforms, which do the same.
"""

import random

import datasets
import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader


def loader(rows, resolution: int, batch_size: int, grey: bool = False, flip: bool = False) -> DataLoader:
    """Return a shuffling loader of {"input": (B, C, H, W) in [-1, 1]}, which decodes rows of `datasets` as it goes."""
    column = next(name for name in rows.column_names if name in ("image", "img"))

    def transform(examples):
        images = []
        for image in examples[column]:
            image = image.convert("L" if grey else "RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
            if flip and random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).float().div(255)
            images.append((pixels[None] if grey else pixels.permute(2, 0, 1)).sub(0.5).div(0.5))
        return {"input": images}

    rows = rows.cast_column(column, datasets.Image())  # `datasets` decodes on access, as in the example
    return DataLoader(rows.with_transform(transform), batch_size=batch_size, shuffle=True, drop_last=True)


class PlainLoop:
    """The example's training loop over a UNet. `step()` takes one optimizer step and returns its loss."""

    def __init__(self, unet, batches: DataLoader, total_steps: int, *, learning_rate=1e-4, device="cpu", dtype=None):
        """Set up the loop. `dtype` is torch.bfloat16 for autocast, or None for the example's default, float32."""
        self.unet, self.loader, self.device, self.dtype = unet.to(device).train(), batches, device, dtype
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.learning_rate = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=500, num_training_steps=total_steps
        )
        self.ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        self.batches = iter(())

    def step(self) -> float:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        images = batch["input"].to(self.device)
        noise = torch.randn(images.shape, device=self.device)
        timesteps = torch.randint(0, 1000, (len(images),), device=self.device).long()
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype is not None):
            output = self.unet(noisy, timesteps).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.detach().item()
