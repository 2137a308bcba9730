"""Define the class Sampler: all settings that determine image k of a model. Evaluations store its `record`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..errors import UserError, no_such, real_number, whole_number
from ..models.classes import Classes
from ..models.classifier import NoisyClassifier
from ..models.judge import MAX_SIDE
from ..models.pretrained import Pretrained, load_classifier, weights_hash
from ..processes import has_bfloat16
from ..sizes import read_size
from .guidance import guide
from .samplers import (
    SAMPLERS,
    check_seed,
    check_settings,
    code_of,
    default_steps,
    default_variance,
    distinct_steps,
    draw,
    image_generators,
    image_shape,
    own_settings_of,
    settings_of,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAR_FROM_NOISE = 0.01  # if abar of the first step is larger, the model expects part of an image, not pure noise


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn. Image k of a model depends on these settings and on nothing else.

    Call `resolve(model)` first. It fills in the defaults, and raises an error if the model does not support a setting.

    Attributes:
        name: ddpm, ddim, dpmsolver++, or another name of `SAMPLERS`.
        num_inference_steps: the number of steps, from 1 to T (the timesteps of the model). None: the length of
            `timesteps` if they are listed. Otherwise all T for ddpm, and 50 (at most T) for other samplers.
        timesteps: how timesteps are spaced (quad, uniform, leading, trailing or linspace, see
            `PaperDDPMScheduler.subsequence`), or the timesteps themselves, as numbers or as text such as "999,500,0".
        eta: for ddim, how much fresh noise is added: from 0 (none) to 1 (as much as ddpm).
        variance_type: for ddpm, fixed_small, fixed_large or learned_range. None: the variance type of the model if
            all T steps are taken. With fewer steps, learned_range if the model has it, else fixed_small.
        dtype: float32, bfloat16, float16 or auto. The UNet computes in this dtype, and the rest stays float32. auto is
            bfloat16 where the device of this process multiplies bfloat16 matrices in hardware, else float32.
        seed: image k is drawn from a random generator seeded with seed + k. Two sets of N images share no noise if
            their seeds are at least N apart.
        class_labels: one class, by its name or number, or a list of classes. With a list, image k gets the label
            `class_labels[k % len(class_labels)]`. None: all classes in turn.
        guidance_scale: how closely images follow the class. 1 is the conditional model itself. See `guidance.guide`.
        classifier: a classifier that guides an unconditional model towards a class: the result of `load_classifier`,
            or a run, a folder or a Hub id to load it from.
        own_settings: the settings of a sampler of your own, e.g. {"order": 3} for a function with the keyword-only
            argument `order`. `sample` and `evaluate` also take them as keywords: order=3.
        size: height and width of the images in pixels, e.g. "48x64" or (48, 64). Both must be multiples of
            2^(levels of the UNet - 1). None: the size that the model was trained on.

    Example:
        >>> model = ddpm_hf.load("runs/digits")
        >>> Sampler(name="ddim", num_inference_steps=10).resolve(model).record(model)["num_inference_steps"]
        10
    """

    name: str = "ddpm"
    num_inference_steps: int | None = None
    timesteps: str | Sequence[int] = "trailing"
    eta: float = 0.0
    variance_type: str | None = None
    dtype: str = "float32"
    seed: int = 0
    class_labels: int | str | Sequence[int | str] | None = None
    guidance_scale: float = 1.0
    classifier: NoisyClassifier | str | Path | None = None
    size: int | str | Sequence[int] | None = None
    own_settings: dict = field(default_factory=dict)

    def resolve(self, model: Pretrained) -> "Sampler":
        """Return these settings with every default filled in for `model`.

        Raises:
            UserError: for settings that contradict each other or that the model does not support.
        """
        if isinstance(self.classifier, (str, Path)):
            return replace(self, classifier=load_classifier(self.classifier)).resolve(model)
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if has_bfloat16(PartialState().device) else "float32"
        if dtype not in DTYPES:
            raise UserError(f"--dtype is {dtype!r}; choose {', '.join(DTYPES)} or auto.")
        seed = check_seed(self.seed)
        eta, guidance_scale = (real_number(f"--{name}", getattr(self, name)) for name in ("eta", "guidance_scale"))
        check_settings(self.name, eta, self.variance_type, model.unet)
        self.network(model)  # raises a UserError if the model does not support the guidance
        timesteps = self.timesteps
        steps = self.num_inference_steps
        if steps is not None:
            steps = whole_number("--num_inference_steps", steps)
        if isinstance(timesteps, str) and re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", timesteps):
            timesteps = [int(t) for t in timesteps.split(",")]
        if isinstance(timesteps, str) and steps is None:
            steps = default_steps(self.name, len(model.scheduler))
        taken = distinct_steps(model.scheduler, steps, timesteps)
        variance_type = self.variance_type or default_variance(model.scheduler, len(taken))
        return replace(
            self,
            num_inference_steps=steps or len(taken),
            timesteps=timesteps if isinstance(timesteps, str) else tuple(map(int, timesteps)),
            eta=eta,
            guidance_scale=guidance_scale,
            seed=seed,
            variance_type=variance_type if "variance_type" in settings_of(self.name) else None,
            dtype=dtype,
            class_labels=self.classes(model).numbers(self.class_labels),
            size=None if self.size is None else size_to_draw(self.size, model.unet),
            own_settings=own_settings_of(self.name, self.own_settings),
        )

    def classes(self, model: Pretrained) -> Classes:
        """Return the classes that can be requested: those of the classifier, or of the model without a classifier."""
        if self.classifier is None:
            return model.classes
        config = self.classifier.config
        return Classes.of_model(config.num_classes, config.id2label)

    def network(self, model: Pretrained) -> nn.Module:
        """Return the model's UNet, guided if these settings ask for it."""
        classifier = None if self.classifier is None else self.classifier.to(model.unet.device)
        return guide(model.unet, model.scheduler, model.classes, self.guidance_scale, classifier)

    def labels(self, indices: Sequence[int]) -> list[int] | None:
        """Return the class number of each image in `indices`, or None for an unconditional model."""
        wanted = self.class_labels
        return None if wanted is None else [wanted[k % len(wanted)] for k in indices]

    def draw(self, model: Pretrained, indices: Sequence[int], on_step: Callable | None = None) -> Tensor:
        """Draw the images numbered `indices` in one batch: float32 (B, C, H, W) in [-1, 1], on the UNet's device.

        `on_step(i, num_steps, sample, pred_original_sample)` is called after each step.

        Raises:
            UserError: if an image has pixels that are not finite.
        """
        listed = not isinstance(self.timesteps, str)
        images = draw(
            self.network(model),
            model.scheduler,
            image_generators(self.seed, indices),
            sampler=self.name,
            num_inference_steps=None if listed else self.num_inference_steps,
            spacing=self.timesteps,
            eta=self.eta,
            variance_type=self.variance_type,
            class_labels=self.labels(indices),
            size=self.size,
            dtype=DTYPES[self.dtype],
            own_settings=self.own_settings,
            on_step=on_step,
        )
        if not images.isfinite().all():
            broken = indices[int((~images.isfinite()).flatten(1).any(dim=1).nonzero()[0])]
            error = UserError(
                f"image {broken} has pixels that are not finite ({self.name}, {self.dtype}): give --dtype float32, or "
                "check whether the training of this model diverged."
            )
            error.on_one_process = True
            raise error
        return images

    def record(self, model: Pretrained) -> dict:
        """Return these settings as JSON values, for records and samples.json."""
        config = model.scheduler.config
        record = {
            "method": self.name,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": self.timesteps if isinstance(self.timesteps, str) else list(self.timesteps),
            "eta": self.eta if "eta" in settings_of(self.name) else None,
            "variance_type": self.variance_type,
            "clip_sample": bool(config.clip_sample or config.thresholding),
            "dtype": self.dtype,
            "seed": self.seed,
            "class_labels": self.class_labels,
            "quantize": "round-uint8",
        }
        if self.class_labels is not None:
            names = self.classes(model).names
            record["class_names"] = list(names) if names else None  # class_labels are indices of this list
        if self.classifier is not None or self.guidance_scale != 1:
            classifier = None if self.classifier is None else weights_hash(self.classifier.state_dict())
            record |= {"guidance_scale": self.guidance_scale, "classifier": classifier}
        if self.size is not None:
            record["size"] = list(self.size)
        if self.own_settings:
            record["own_settings"] = self.own_settings
        if (code := code_of(SAMPLERS[self.name])) is not None:
            record["code"] = code
        return record

    def warnings(self, model: Pretrained) -> list[str]:
        """Return a sentence for each setting that is allowed but gives poor images."""
        lines = []
        if self.size is not None:
            height, width = image_shape(model.unet)[1:]
            lines.append(
                f"Warning: this model was trained on {height}x{width} pixels, and --size {self.size[0]}x"
                f"{self.size[1]} draws at another size: expect repeated or stretched parts, and look at the images."
            )
        first = distinct_steps(model.scheduler, self.num_inference_steps, self.timesteps)[0][0]
        last = len(model.scheduler) - 1
        signal = float(model.scheduler.alphas_cumprod_at(first))
        if signal <= FAR_FROM_NOISE or first == last:
            return lines
        return [
            *lines,
            f"Warning: sampling starts from pure noise at t = {first}, but at this t the model was trained on "
            f"images that are not pure noise (abar is {signal:.2g}): give --timesteps trailing, which starts at "
            f"t = {last}.",
        ]


def size_to_draw(size, unet: nn.Module) -> tuple[int, int] | None:
    """Return --size as (H, W), or None if the UNet was trained on this size.

    Raises:
        UserError: for a size that the levels of the UNet cannot halve.
    """
    height, width = read_size(size, "--size", most=MAX_SIDE)
    multiple = 2 ** (len(unet.config.down_block_types) - 1)
    if height % multiple or width % multiple:
        raise UserError(
            f"--size is {height}x{width}, but this model halves both sides {len(unet.config.down_block_types) - 1} "
            f"times: give multiples of {multiple}."
        )
    return None if (height, width) == image_shape(unet)[1:] else (height, width)


def sampler_named(sampler: "str | Sampler", settings: dict) -> Sampler:
    """Return a Sampler with these settings. `sampler` is the name of a sampler, or a Sampler to copy and change.

    Raises:
        UserError: for a name or a setting that does not exist.
    """
    name = sampler.name if isinstance(sampler, Sampler) else sampler
    if name not in SAMPLERS:
        raise UserError(no_such("sampler", name, SAMPLERS))
    fields = set(Sampler.__dataclass_fields__) - {"name"}
    own = {key: value for key, value in settings.items() if key in set(settings_of(name)) - fields}
    if unknown := set(settings) - fields - set(own):
        raise UserError(no_such("setting of a sampler", min(unknown), sorted({*fields, *settings_of(name)})))
    settings = {key: value for key, value in settings.items() if key in fields}
    sampler = sampler if isinstance(sampler, Sampler) else Sampler(name=name)
    return replace(sampler, **{"own_settings": sampler.own_settings | own} | settings)
