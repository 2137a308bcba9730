"""Open any DDPM in diffusers' format, from a folder or the Hub, and draw with it for the Space."""

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
FRAME_SECONDS = 0.2  # between two updates of the images on the page
HERE = Path(__file__).resolve().parent


class Model:
    """A model and its two pipelines: one draws images (class_guided.py), the other restores them.

    `restoration` is None if the model cannot restore images.
    """

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
        """The classes that a visitor can choose. It is [""] if the model has no classes."""
        more = [NO_CLASS] if self.null_class is not None else []
        return [IN_TURN, *self.labels, *more] if self.labels else [""]

    def class_numbers(self, class_name: str, number: int) -> list[int] | None:
        """Return the class of each of `number` images, or None for "no class"."""
        if not self.labels or class_name == NO_CLASS:
            return None
        if class_name == IN_TURN:
            return [k % len(self.labels) for k in range(number)]
        return [self.labels.index(class_name)] * number

    @cached_property
    def max_evaluations(self) -> int:
        """The number of UNet evaluations, each of one image, that a request may use.

        It is how many this machine can do in DDPM_REQUEST_SECONDS. This is measured, and rounded down to two digits.
        """
        labels, ends = self.class_numbers(IN_TURN, 4), [time.perf_counter()]
        for x_0 in self.draw(range(4), "DDIM", min(4, self.T), labels):
            x_0.cpu()  # wait for the GPU
            ends.append(time.perf_counter())
        fastest = min(end - start for start, end in zip(ends, ends[1:]))
        evaluations = max(1, int(4 / fastest * float(os.environ.get("DDPM_REQUEST_SECONDS", "60"))))
        digits = 10 ** max(0, len(str(evaluations)) - 2)
        return evaluations // digits * digits

    def affordable_steps(self, number: int, wanted: int) -> int:
        """Return the steps for `number` images: `wanted`, or as many as one request may use. At least 1."""
        return max(1, min(wanted, self.T, self.max_evaluations // number))

    def draw(self, seeds, sampler: str, steps: int, labels=None, guidance_scale=1.0) -> Iterator[torch.Tensor]:
        """Draw one image per seed. Yield the x_0 (B, C, H, W) that each step predicts. The last x_0 is the result."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"generator": generators, "num_images": len(seeds) if labels is None else None}
        for _, _, tensors in self.pipeline.steps(labels, guidance_scale, sampler.lower(), steps, **options):
            yield tensors["pred_original_sample"]

    def draw_frames(self, *arguments) -> Iterator[tuple[int, torch.Tensor]]:
        """Draw, but yield (step, x_0) only every FRAME_SECONDS and at the last step. Steps count from 1."""
        shown, frame = time.perf_counter(), None
        for i, x_0 in enumerate(self.draw(*arguments), 1):
            frame = i, x_0
            if time.perf_counter() - shown >= FRAME_SECONDS:
                yield frame
                shown, frame = time.perf_counter(), None
        if frame is not None:
            yield frame

    def _example(self, seed: int) -> torch.Tensor:
        """Return an image (1, C, H, W) that the model draws from a seed."""
        labels = [seed % len(self.labels)] if self.labels else None
        *_, x_0 = self.draw([seed], "DDIM", self.affordable_steps(1, 50), labels)
        return x_0.cpu()

    def forward(self, x_0: torch.Tensor, t: int, seed: int) -> tuple[torch.Tensor, float]:
        """Add noise to x_0 in [-1, 1]. Return (x_t, alpha_bar_t). x_t (1, C, H, W) equals x_0 at t = 0."""
        alpha_bar = self.scheduler.alphas_cumprod[t - 1].item() if t else 1.0
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise, alpha_bar

    def guess(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the clean image (1, C, H, W) that the network predicts without a class from x_t, t from 1 to T."""
        return self.pipeline.predict(x.to(self.unet.device), t - 1).cpu()


def open_model(name: str) -> Model:
    """Open a pipeline folder or a Hub repository of a DDPM.

    Raises:
        Refused: if the model does not exist, or is not a DDPM.
    """
    is_here = Path(name).is_dir()
    if not is_here and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Refused(f"DDPM_MODEL is {name!r}, which is neither a folder nor a Hub id: give a folder, or USER/NAME.")
    diffusers.utils.logging.set_verbosity_error()  # else diffusers warns that stock pipelines ignore id2label
    diffusers.utils.logging.disable_progress_bar()
    try:
        index = DDPMPipeline.load_config(name)
        if isinstance(index["_class_name"], str):
            pipeline = DDPMPipeline.from_pretrained(name)
            unet, config = pipeline.unet, dict(pipeline.scheduler.config)
        else:  # an export that names a pipeline file; its code is not needed here
            unet = UNet2DModel.from_pretrained(name, subfolder="unet")
            config = DDPMScheduler.load_config(name, subfolder="scheduler")
        scheduler = DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_use_default_values"})
        unet = unet.float().to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        id2label = index.get("id2label") if unet.config.num_class_embeds else None
        guided = community_pipeline("class_guided").ClassGuidedPipeline(unet, scheduler, id2label=id2label)
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"DDPM_MODEL is {name!r}, which cannot be opened as a DDPM ({reason}): give the folder or the Hub id of a "
            "pipeline in diffusers' format."
        ) from error
    if unet.config.sample_size is None:
        raise Refused(f"{name} does not say the size of its images: add sample_size to its unet/config.json.")
    url = None if is_here else f"https://huggingface.co/{name}"
    return Model(Path(name).resolve().name if is_here else name, url, guided)


def community_pipeline(name: str):
    """Import a file of pipelines/ and return the module.

    In a Space, pipelines/ is inside this folder. In a source tree, it is next to this folder.
    """
    folder = next(folder for folder in (HERE / "pipelines", HERE.parent / "pipelines") if folder.is_dir())
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
