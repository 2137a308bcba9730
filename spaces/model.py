"""The model of the Space: any DDPM in diffusers' format, opened from a folder or the Hub, and what it draws."""

import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import diffusers
import torch
from checks import Refused
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


SAMPLERS = ("DDIM", "DDPM")
IN_TURN, NO_CLASS = "each class in turn", "no class"
FRAME_SECONDS = 0.2  # between two looks at images that form
HERE = Path(__file__).resolve().parent


class Model:
    """A pipeline of pipelines/class_guided.py that draws, and one of restoration.py, None if it cannot restore."""

    def __init__(self, name: str, url: str | None, pipeline):
        self.name, self.url, self.pipeline = name, url, pipeline
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        self.labels, self.null_class = pipeline.labels, pipeline.null_class
        self.T, self.channels = self.scheduler.config.num_train_timesteps, self.unet.config.in_channels
        size = self.unet.config.sample_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.example = lru_cache(64)(self._example)
        self.restoration = None
        if not self.labels or self.null_class is not None:
            names = dict(enumerate(self.labels)) or None
            self.restoration = community_pipeline("restoration").RestorationPipeline(self.unet, self.scheduler, names)
        for one in (pipeline, self.restoration):
            if one is not None:
                one.set_progress_bar_config(disable=True)

    @property
    def classes(self) -> list[str]:
        """The classes that a visitor can choose, [""] if the model has none."""
        more = [NO_CLASS] if self.null_class is not None else []
        return [IN_TURN, *self.labels, *more] if self.labels else [""]

    def class_numbers(self, class_name: str, number: int) -> list[int] | None:
        """Return the class of each of so many images; None for "no class"."""
        if not self.labels or class_name == NO_CLASS:
            return None
        if class_name == IN_TURN:
            return [k % len(self.labels) for k in range(number)]
        return [self.labels.index(class_name)] * number

    @cached_property
    def max_evaluations(self) -> int:
        """How many times one request may have the UNet evaluate one image, as measured on this machine.

        It is what DDPM_REQUEST_SECONDS allow, rounded down to two digits, which is what the measurement is worth.
        """
        labels, ends = self.class_numbers(IN_TURN, 4), [time.perf_counter()]
        for x_0 in self.draw(range(4), "DDIM", min(4, self.T), labels):
            x_0.cpu()  # waits for a GPU
            ends.append(time.perf_counter())
        fastest = min(end - start for start, end in zip(ends, ends[1:]))
        evaluations = max(1, int(4 / fastest * float(os.environ.get("DDPM_REQUEST_SECONDS", "60"))))
        digits = 10 ** max(0, len(str(evaluations)) - 2)
        return evaluations // digits * digits

    def affordable_steps(self, number: int, wanted: int) -> int:
        """Return as many of the steps wanted as one request may take for so many images, at least one."""
        return max(1, min(wanted, self.T, self.max_evaluations // number))

    def draw(self, seeds, sampler: str, steps: int, labels=None, guidance_scale=1.0) -> Iterator[torch.Tensor]:
        """Yield the x_0 (B, C, H, W) that each step predicts, one image for each seed; the last are the images."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"generator": generators, "num_images": len(seeds) if labels is None else None}
        for _, _, tensors in self.pipeline.steps(labels, guidance_scale, sampler.lower(), steps, **options):
            yield tensors["pred_original_sample"]

    def draw_frames(self, *arguments) -> Iterator[tuple[int, torch.Tensor]]:
        """Draw, and yield steps (counted from 1) that are FRAME_SECONDS apart, and the last one."""
        shown, frame = time.perf_counter(), None
        for i, x_0 in enumerate(self.draw(*arguments), 1):
            frame = i, x_0
            if time.perf_counter() - shown >= FRAME_SECONDS:
                yield frame
                shown, frame = time.perf_counter(), None
        if frame is not None:
            yield frame

    def _example(self, seed: int) -> torch.Tensor:
        """Return an image of the model's own (1, C, H, W), drawn once for each seed."""
        labels = [seed % len(self.labels)] if self.labels else None
        *_, x_0 = self.draw([seed], "DDIM", self.affordable_steps(1, 50), labels)
        return x_0.cpu()

    def forward(self, x_0: torch.Tensor, t: int, seed: int) -> tuple[torch.Tensor, float]:
        """Return x_t (1, C, H, W) of x_0 in [-1, 1], and alpha_bar_t. t = 0 is x_0 itself, t = T the noise."""
        alpha_bar = self.scheduler.alphas_cumprod[t - 1].item() if t else 1.0
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise, alpha_bar

    def guess(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the clean image (1, C, H, W) that the network sees in x_t, t from 1 to T, without a class."""
        return self.pipeline.predict(x.to(self.unet.device), t - 1).cpu()


def open_model(name: str) -> Model:
    """Open a pipeline folder or a Hub repository of a DDPM.

    Raises:
        Refused: if there is none, or if it is not a DDPM.
    """
    is_here = Path(name).is_dir()
    if not is_here and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Refused(f"DDPM_MODEL is {name!r}, neither a folder here nor USER/NAME on the Hub: give one of them.")
    diffusers.utils.logging.set_verbosity_error()  # a stock pipeline would warn that it does not use id2label
    diffusers.utils.logging.disable_progress_bar()
    try:
        index = DDPMPipeline.load_config(name)
        if isinstance(index["_class_name"], str):
            pipeline = DDPMPipeline.from_pretrained(name)
            unet, config = pipeline.unet, dict(pipeline.scheduler.config)
        else:  # an export that names a pipeline file, whose code is not needed here
            unet = UNet2DModel.from_pretrained(name, subfolder="unet")
            config = DDPMScheduler.load_config(name, subfolder="scheduler")
        scheduler = DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_use_default_values"})
        unet = unet.float().to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        id2label = index.get("id2label") if unet.config.num_class_embeds else None
        guided = community_pipeline("class_guided").ClassGuidedPipeline(unet, scheduler, id2label=id2label)
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"DDPM_MODEL is {name!r}, which does not open as a DDPM ({reason}): give the folder or the Hub id of a "
            "pipeline in diffusers' format."
        ) from error
    if unet.config.sample_size is None:
        raise Refused(f"{name} does not say the size of its images: add sample_size to its unet/config.json.")
    url = None if is_here else f"https://huggingface.co/{name}"
    return Model(Path(name).resolve().name if is_here else name, url, guided)


def community_pipeline(name: str):
    """Return the module of a file of pipelines/, which is in this folder in a Space, and beside it in the sources."""
    folder = next(folder for folder in (HERE / "pipelines", HERE.parent / "pipelines") if folder.is_dir())
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
