"""The model of the Space: any DDPM in diffusers' format, opened from a folder or the Hub, and what it draws.

Image k of a seed comes from `torch.Generator().manual_seed(seed + k)`, on the timesteps round((k+1) T/S) - 1 of the
community pipelines, so that both draw the same images.
"""

import importlib.util
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


SAMPLERS = ("DDIM", "DDPM")
HERE = Path(__file__).resolve().parent


class Refused(Exception):
    """What a visitor, or who starts the Space, is told in one sentence."""


@dataclass(frozen=True)
class Model:
    """A UNet in float32 and its schedule; `labels` names the classes, `null_class` is the number of "no class"."""

    name: str
    url: str | None
    unet: torch.nn.Module
    scheduler: DDPMScheduler
    labels: list[str]
    null_class: int | None

    @property
    def T(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @cached_property
    def evaluations_per_second(self) -> float:
        """How many images the UNet evaluates in a second, four at a time, here and now; measured once."""
        x, seconds = torch.zeros(4, self.channels, *self.size), []
        for _ in range(4):
            start = time.perf_counter()
            self.predict(x, 0, [0] * 4).cpu()
            seconds.append(time.perf_counter() - start)
        return 4 / min(seconds)

    def noise(self, seeds: list[int]) -> tuple[torch.Tensor, list[torch.Generator]]:
        """White noise (B, C, H, W), an image a seed, and the generators that go on from there."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = len(seeds), self.channels, *self.size
        return randn_tensor(shape, generator=generators, device=self.unet.device, dtype=torch.float32), generators

    def predict(self, x: torch.Tensor, t: int, class_labels: list[int] | None, guidance_scale: float = 1.0):
        """The UNet's output at x_t (B, C, H, W); guided it is out_null + w (out_class - out_null), of both halves."""
        x, known = x.to(self.unet.device), {}
        if guidance_scale != 1:
            x, class_labels = torch.cat([x, x]), [self.null_class] * len(x) + class_labels
        if self.labels:
            known["class_labels"] = torch.tensor(class_labels, device=x.device)
        output = self.unet(x, torch.full((len(x),), t, device=x.device), **known).sample
        if guidance_scale == 1:
            return output
        null, conditional = output.chunk(2)
        guided = null + guidance_scale * (conditional - null)
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)  # the class's variance

    def schedule(self, sampler: str, num_inference_steps: int) -> DDPMScheduler:
        """Stock DDPM on trailing timesteps; on fewer than T with the variance fixed_small, unless it is learned."""
        kind = (self.scheduler.config.variance_type or "fixed_small").removesuffix("_log")
        if sampler == "DDIM" or (num_inference_steps < self.T and not kind.startswith("learned")):
            kind = "fixed_small"
        scheduler = DDPMScheduler.from_config({**self.scheduler.config, "variance_type": kind})
        steps = np.round(np.arange(self.T, 0, -self.T / num_inference_steps)[:num_inference_steps]).astype(int) - 1
        scheduler.set_timesteps(timesteps=steps.tolist())
        return scheduler

    def sample(
        self,
        seeds: list[int],
        sampler: str,
        num_inference_steps: int,
        class_labels: list[int] | None = None,
        guidance_scale: float = 1.0,
    ) -> Iterator[torch.Tensor]:
        """Yield pred_original_sample (B, C, H, W) of every step, an image a seed; the last one is the images.

        "DDPM" is Algorithm 2 of Ho et al. 2020, "DDIM" eq. (12) of Song et al. 2021 with eta = 0. Where x_0 was
        guided, DDIM's eps is that of the clipped x_0, else as predicted, as in the community pipeline.
        """
        scheduler = self.schedule(sampler, num_inference_steps)
        timesteps, kind = scheduler.timesteps.tolist(), scheduler.config.prediction_type
        x, generators = self.noise(seeds)
        for t, prev_t in zip(timesteps, [*timesteps[1:], -1]):
            output = self.predict(x, t, class_labels, guidance_scale)
            if not scheduler.config.variance_type.startswith("learned"):
                output = output[:, : self.channels]
            step = scheduler.step(output, t, x, generator=generators)
            x_0 = step.pred_original_sample
            if sampler == "DDPM":
                x = step.prev_sample
            else:
                alpha_bar = scheduler.alphas_cumprod[t].item()
                signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
                if kind == "sample" or guidance_scale != 1:
                    epsilon = (x - signal * x_0) / noise
                else:
                    epsilon = output if kind == "epsilon" else signal * output + noise * x
                alpha_bar_prev = scheduler.alphas_cumprod[prev_t].item() if prev_t >= 0 else 1.0
                x = alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev) ** 0.5 * epsilon
            yield x_0

    def forward(self, x_0: torch.Tensor, t: int, seed: int) -> tuple[torch.Tensor, float]:
        """Return x_t (1, C, H, W) of x_0 (1, C, H, W) in [-1, 1] and alpha_bar_t; t = 0 is x_0 itself, T the noise."""
        alpha_bar = self.scheduler.alphas_cumprod[t - 1].item() if t else 1.0
        return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * self.noise([seed])[0].cpu(), alpha_bar

    def guess(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """The clean image (1, C, H, W) that the UNet sees in x_t, t from 1 to T, whatever its class."""
        scheduler = self.schedule("DDIM", self.T)
        x = x.to(self.unet.device)
        output = self.predict(x, t - 1, [self.null_class])[:, : self.channels]
        return scheduler.step(output, t - 1, x, generator=torch.Generator()).pred_original_sample.cpu()


def open_model(name: str) -> Model:
    """Open a pipeline folder or a Hub repository of a DDPM.

    Raises:
        Refused: if there is none, or it is something else than a DDPM.
    """
    is_here = Path(name).is_dir()
    if not is_here and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Refused(f"DDPM_MODEL is {name!r}, neither a folder here nor USER/NAME on the Hub: give one of them.")
    diffusers.utils.logging.set_verbosity_error()  # a stock pipeline would say that it has no use for id2label
    diffusers.utils.logging.disable_progress_bar()
    try:
        index = DDPMPipeline.load_config(name)
        id2label = index.get("id2label") or {}
        if isinstance(index["_class_name"], str):
            pipeline = DDPMPipeline.from_pretrained(name)
            unet, config = pipeline.unet, dict(pipeline.scheduler.config)
        else:  # an export that names a pipeline file, whose code is not needed here
            unet = UNet2DModel.from_pretrained(name, subfolder="unet")
            config = DDPMScheduler.load_config(name, subfolder="scheduler")
        size, num_embeds = unet.config.sample_size, unet.config.num_class_embeds
        scheduler = DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_use_default_values"})
    except Exception as error:  # whatever a file can be broken by
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"DDPM_MODEL is {name!r}, which does not open as a DDPM ({reason}): give the folder or the Hub id of a "
            "pipeline in diffusers' format."
        ) from error
    if size is None:
        raise Refused(f"{name} does not say the size of its images: add sample_size to its unet/config.json.")
    labels = [id2label[key] for key in sorted(id2label, key=int)] or [str(k) for k in range(num_embeds or 0)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(
        name=Path(name).resolve().name if is_here else name,
        url=None if is_here else f"https://huggingface.co/{name}",
        unet=unet.float().to(device).eval().requires_grad_(False),
        scheduler=scheduler,
        labels=labels if num_embeds else [],
        null_class=len(labels) if num_embeds and num_embeds > len(labels) else None,
    )


def community_pipeline(name: str):
    """The module of a pipeline file of ours: beside this one in a Space, beside `spaces/` in the source tree."""
    folder = next(folder for folder in (HERE / "pipelines", HERE.parent / "pipelines") if folder.is_dir())
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
