"""Open any DDPM in diffusers' format, from a folder or the Hub, and draw with it for the Space."""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import diffusers
import torch
from checks import MAX_GUIDANCE, Refused, between, request_seconds
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


SAMPLERS = ("DDIM", "DDPM")
IN_TURN, NO_CLASS = "each class in turn", "no class"
FRAME_SECONDS = 0.2  # between two updates of the images on the page
QUICK_SECONDS = 1.5  # to draw the first images of the page
MAX_SIDE = 1024  # pixels
HERE = Path(__file__).resolve().parent
# The files to download from the Hub. Some old repositories have the UNet's and the scheduler's files at the top.
FILES = ["model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model*.safetensors*"]
FILES += ["unet/*.json", "unet/*.safetensors", "scheduler/*.json"]


def evaluations(guidance: float) -> int:
    """Return how often a step evaluates the network for each image: twice with guidance, else once."""
    return 1 if guidance == 1 else 2


class Model:
    """A model and its two pipelines: `pipeline` draws images (class_guided.py), `restoration` restores them.

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
            self.restoration = shared_module("restoration").RestorationPipeline(self.unet, self.scheduler, names)
        for one in (pipeline, self.restoration):
            if one is not None:
                one.set_progress_bar_config(disable=True)

    @property
    def classes(self) -> list[str]:
        """The classes that a visitor can choose. It is [""] if the model has no classes."""
        more = [NO_CLASS] if self.null_class is not None else []
        return [IN_TURN, *self.labels, *more] if self.labels else [""]

    @property
    def first_guidance(self) -> float:
        """The guidance scale that the page opens with: 2, or 1 (no guidance) if the model cannot be guided."""
        return 1.0 if self.null_class is None else 2.0

    def guidance(self, given, class_name: str) -> float:
        """Return the guidance scale: `given`, or 1 (no guidance) for "no class" and for a model that cannot be guided.

        Raises:
            Refused: if `given` is not a number from 0 to MAX_GUIDANCE.
        """
        scale = between("guidance", 1 if given is None else given, 0, MAX_GUIDANCE)
        return 1.0 if self.null_class is None or class_name == NO_CLASS else scale

    def class_numbers(self, class_name: str, number: int) -> list[int] | None:
        """Return the class numbers with which to draw `number` images of the class that a visitor chose.

        For "each class in turn", the numbers are 0, 1, ..., and begin again after the last class. For "no class", or
        if the model has no classes, return None instead of a list.
        """
        if not self.labels or class_name == NO_CLASS:
            return None
        if class_name == IN_TURN:
            return [k % len(self.labels) for k in range(number)]
        return [self.labels.index(class_name)] * number

    @cached_property
    def max_evaluations(self) -> int:
        """The number of UNet evaluations, each of one image, that a request may use.

        It is how many this machine does in DDPM_REQUEST_SECONDS, as measured, rounded down to two digits.
        """
        labels, ends = self.class_numbers(IN_TURN, 4), [time.perf_counter()]
        for x_0 in self.draw(range(4), "DDIM", min(4, self.T), labels):
            if not x_0.isfinite().all():  # this also waits for a GPU
                raise ValueError("the images that it draws are not finite numbers")
            ends.append(time.perf_counter())
        fastest = min(end - start for start, end in zip(ends, ends[1:]))
        evaluations = max(1, int(4 / fastest * request_seconds()))
        digits = 10 ** max(0, len(str(evaluations)) - 2)
        return evaluations // digits * digits

    def affordable_steps(self, number: int, wanted: int) -> int:
        """Return how many steps a request may use to draw `number` images: at most `wanted`, but at least 1."""
        return max(1, min(wanted, self.T, self.max_evaluations // number))

    def quick_steps(self, number: int) -> int:
        """Return how many DDIM steps draw `number` images in about QUICK_SECONDS: 10 to 50.

        If a request may not use so many steps, return the most that it may use.
        """
        steps = int(QUICK_SECONDS * self.speed / number)
        return self.affordable_steps(number, min(50, max(10, steps)))

    @property
    def speed(self) -> float:
        """The number of UNet evaluations of one image that this machine does in a second."""
        return self.max_evaluations / request_seconds()

    @property
    def is_fast(self) -> bool:
        """Whether an image takes less than 5 s in 50 steps, so that the page can draw images when it opens."""
        return self.speed > 10

    def draw(self, seeds, sampler: str, steps: int, labels=None, guidance_scale=1.0) -> Iterator[torch.Tensor]:
        """Draw one image per seed. Yield the x_0 (B, C, H, W) that each step predicts. The last x_0 is the result."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"generator": generators, "num_images": len(seeds) if labels is None else None}
        for _, _, tensors in self.pipeline.steps(labels, guidance_scale, sampler.lower(), steps, **options):
            yield tensors["pred_original_sample"]

    def draw_frames(self, seeds, sampler: str, steps: int, *more) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """Draw, and yield (step, x_0, is_due) after each step. Steps count from 1.

        `is_due` is True if the page should show this step: after every FRAME_SECONDS, and after the last step.
        """
        shown = time.perf_counter()
        for i, x_0 in enumerate(self.draw(seeds, sampler, steps, *more), 1):
            is_due = i == steps or time.perf_counter() - shown >= FRAME_SECONDS
            yield i, x_0, is_due
            if is_due:
                shown = time.perf_counter()

    def _example(self, seed: int) -> torch.Tensor:
        """Return an image (1, C, H, W) that the model draws from a seed."""
        labels = [seed % len(self.labels)] if self.labels else None
        *_, x_0 = self.draw([seed], "DDIM", self.affordable_steps(1, 50), labels)
        return x_0.cpu()

    def forward(self, x_0: torch.Tensor, t: int, seed: int) -> tuple[torch.Tensor, float]:
        """Add noise to x_0 in [-1, 1]. Return (x_t, alpha_bar_t). x_t (B, C, H, W) equals x_0 at t = 0."""
        alpha_bar = self.scheduler.alphas_cumprod[t - 1].item() if t else 1.0
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise, alpha_bar

    def guess(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the clean images (B, C, H, W) that the network predicts from x_t without a class; t is 1 to T."""
        return self.pipeline.predict(x.to(self.unet.device), t - 1).cpu()

    def is_unfamiliar(self, x_0: torch.Tensor) -> bool:
        """Return whether an image (1, C, H, W) in [-1, 1] looks like nothing that the model has learned.

        The image gets noise, with alpha_bar near 1/2, and the network predicts the clean image. The image is
        unfamiliar if the mean squared error of this prediction is above 2 E + 0.003, where E is the largest error for
        four images that the model drew. The result is False for a slow model, and for a model that needs a class.
        """
        if self.restoration is None or not self.is_fast:
            return False
        return self._denoising_error(x_0) > 2 * self._own_error + 0.003

    @cached_property
    def _own_error(self) -> float:
        return max(self._denoising_error(self.example(seed)) for seed in range(4))

    def _denoising_error(self, x_0: torch.Tensor) -> float:
        """Return the mean squared error of the network's guess, from four noisy copies with alpha_bar near 1/2."""
        t = 1 + int((self.scheduler.alphas_cumprod - 0.5).abs().argmin())
        x_0 = x_0.repeat(4, 1, 1, 1)
        x_t, _ = self.forward(x_0, t, seed=0)
        return (self.guess(x_t, t) - x_0).square().mean().item()


def open_model(name: str) -> Model:
    """Open a pipeline folder or a Hub repository of a DDPM, and draw with it once.

    Only safetensors are read, and no code of the model is run.

    Raises:
        Refused: if the model does not exist, is not a DDPM, or cannot draw.
    """
    is_here = Path(name).is_dir()
    if not is_here and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Refused(f"DDPM_MODEL is {name!r}, which is neither a folder nor a Hub id: give a folder, or USER/NAME.")
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # the error below gives the reason
    diffusers.utils.logging.disable_progress_bar()
    url = None if is_here else f"https://huggingface.co/{name}"
    try:
        folder = Path(name) if is_here else shared_module("hub_requests").download(name, FILES, ignore="*.fp16.*")
        model = Model(folder.resolve().name if is_here else name, url, _load(folder))
        _ = model.max_evaluations  # draws for the first time
    except Refused:
        raise
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refused(
            f"DDPM_MODEL is {name!r}, which cannot be opened as a DDPM ({reason}): give the folder or the Hub id of a "
            "pipeline in diffusers' format."
        ) from error
    return model


def _load(folder: Path):
    """Return the pipeline that draws, made of the UNet, the scheduler and the class names in a folder."""
    index = DDPMPipeline.load_config(folder)
    if index["unet"][1] != "UNet2DModel":
        raise ValueError(f"its UNet is a {str(index['unet'][1])[:40]}, not a UNet2DModel")
    # Some old pipelines have the files of all parts at the top.
    unet_folder, scheduler_folder = (
        folder / part if (folder / part).is_dir() else folder for part in ("unet", "scheduler")
    )
    config, schedule = UNet2DModel.load_config(unet_folder), DDPMScheduler.load_config(scheduler_folder)
    judge = shared_module("judge")
    judge.check_index(index)
    judge.check_unet(config, index)
    judge.check_scheduler(schedule)
    _check_page(config)
    _check_weights(unet_folder)
    scheduler = DDPMScheduler.from_config({k: v for k, v in schedule.items() if k != "_use_default_values"})
    judge.check_schedule(scheduler)
    unet, info = UNet2DModel.from_pretrained(
        unet_folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError("its weights are not complete")
    judge.check_weights(unet)
    judge.check_together(unet.config, scheduler.config)
    unet = unet.float().to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    id2label = index.get("id2label") if unet.config.num_class_embeds else None
    return shared_module("class_guided").ClassGuidedPipeline(unet, scheduler, id2label=id2label)


def _check_weights(folder: Path):
    """Refuse a folder without safetensors, or with an index that names files of another format."""
    if not any(folder.glob("*.safetensors")):
        raise Refused(
            f"{folder} has no safetensors weights, and the Space opens no other format: give a model that was saved "
            "as safetensors."
        )
    for path in folder.glob("*.safetensors.index.json"):
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise Refused(f"{path} names other files than safetensors: give a model saved as safetensors only.")


def _check_page(config: dict):
    """Refuse the config of a UNet whose images this page cannot show."""
    size, channels = config["sample_size"], config.get("in_channels", 3)
    sides = size if isinstance(size, (list, tuple)) else [size]
    if max(sides) > MAX_SIDE:
        raise Refused(f"The model's sample_size is {size}: give a model of at most {MAX_SIDE} pixels a side.")
    if channels not in (1, 3):
        raise Refused(f"The model's images have {channels} channels: give a model of 1 or 3.")


def shared_module(name: str):
    """Import a file that the Space shares with the package: a pipeline, `judge` or `hub_requests`.

    In a Space, these files are inside this folder. Else they are in the package and in pipelines/.
    """
    package = HERE.parent / "ddpm_hf" if (HERE.parent / "ddpm_hf").is_dir() else HERE.parent
    folders = (HERE, HERE / "pipelines", HERE.parent / "pipelines", package, package / "models")
    path = next(path for folder in folders if (path := folder / f"{name}.py").is_file())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
