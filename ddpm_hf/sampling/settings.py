"""All that decides how image k looks."""

import re

import torch

from ..errors import UserError
from ..models.pretrained import Pretrained
from .samplers import check_method, default_variance


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAR_FROM_NOISE = 0.01  # abar of the first step: with more signal left than this, pure noise is no fair beginning


def resolve_sampler(
    model: Pretrained,
    *,
    method: str = "ddpm",
    num_inference_steps: int | None = None,
    timesteps: str = "trailing",
    eta: float = 0.0,
    variance_type: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    class_labels: list[int | str] | None = None,
    guidance_scale: float = 1.0,
    classifier: str | None = None,
) -> tuple[dict, list[str]]:
    """Return all that decides how image k of `model` looks, nothing left to a default, and warnings to print.

    Args:
        timesteps: a spacing of `PaperDDPMScheduler.subsequence`, or timesteps joined by commas.
        class_labels: image k has label `class_labels[k % len]`, a name or a number; None: all classes in turn, if any.
        guidance_scale: see `guidance.guide`; `classifier` is the SHA-256 of the classifier that guides, if one does.

    Raises:
        UserError: for what `sample` or the scheduler refuse.
    """
    scheduler = model.scheduler
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
    check_method(method, eta, variance_type, model.unet)
    listed = re.fullmatch(r"\d+(,\d+)*", timesteps)
    spacing = [int(t) for t in timesteps.split(",")] if listed else timesteps
    if num_inference_steps is None and not listed:
        num_inference_steps = len(scheduler) if method == "ddpm" else min(50, len(scheduler))
    steps = [(t, prev_t) for t, prev_t in scheduler.subsequence(num_inference_steps, spacing) if t != prev_t]
    if class_labels is None and model.num_classes:
        class_labels = range(model.num_classes)
    class_labels = None if class_labels is None else [label_number(label, model) for label in class_labels]
    clip = scheduler.config.clip_sample or scheduler.config.thresholding
    sampler = {
        "method": method,
        "num_inference_steps": num_inference_steps or len(steps),
        "timesteps": spacing,
        "eta": eta if method == "ddim" else None,
        "variance_type": (variance_type or default_variance(scheduler, len(steps))) if method == "ddpm" else None,
        "clip_sample": bool(clip),
        "dtype": dtype,
        "seed": seed,
        "class_labels": class_labels,
        "quantize": "round-uint8",
    }
    if class_labels is not None:
        sampler["class_names"] = model.class_names  # what the labels mean
    if classifier is not None or guidance_scale != 1:
        sampler |= {"guidance_scale": guidance_scale, "classifier": classifier}
    warnings = []
    signal = float(scheduler.alphas_cumprod_at(steps[0][0]))
    if signal > FAR_FROM_NOISE and steps[0][0] < len(scheduler) - 1:
        warnings.append(
            f"Warning: the first step is t = {steps[0][0]}, where abar is {signal:.2g}: sampling begins in pure "
            f"noise, but the model expects some image there; --timesteps trailing begins at t = {len(scheduler) - 1}."
        )
    return sampler, warnings


def label_number(label: int | str, model: Pretrained) -> int:
    """Return the number of a class given by its name, or by its number; an unknown one is a UserError."""
    known = model.class_names or list(map(str, range(model.num_classes)))
    if label in known:
        return known.index(label)
    if str(label).isdigit() and int(label) < model.num_classes:
        return int(label)
    if not known:
        raise UserError("this model knows no classes: leave --class_labels out, or give a --classifier to guide it.")
    raise UserError(f"--class_labels has {label!r}, but this model knows {', '.join(known)}: give names or numbers.")


def sampler_flags(arguments) -> dict:
    """Return the flags that `resolve_sampler` takes."""
    names = ["num_inference_steps", "timesteps", "eta", "variance_type", "dtype", "seed", "class_labels"]
    return {"method": arguments.sampler or "ddpm"} | {name: getattr(arguments, name) for name in names}
