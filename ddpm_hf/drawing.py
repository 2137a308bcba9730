"""The drawing of many samples: by any number of processes, gone on with after a kill, each image always the same."""

import dataclasses
import json
import os
import re
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from tqdm.auto import tqdm

from . import UserError
from .checkpoints import write_beside, writing
from .figures import image_sheet
from .guidance import guide
from .pretrained import Pretrained, load_classifier, load_pretrained, names_of, weights_hash
from .samples import SCHEMA, check_same_samples, file_name, read_record, read_samples
from .sampling import check_method, default_variance, image_generators, sample, step_seconds, to_pil, to_uint8


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_SHEET = 64  # images that are shown of a set
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


def draw_samples(model: Pretrained, sampler: dict, num_images: int, output, batch_size: int, progress=True) -> Path:
    """Draw images 0..num_images-1 into a folder, or into one .npz; every process of a launch calls this.

    Image k lies in block k // batch_size, and a block is drawn by one process in one batch, whatever is there already:
    so a job that was killed ends with the same bytes as one that was not, on any number of processes. That needs the
    same make of processor and number of threads. Others round differently, which may move a pixel by one grey level.

    Args:
        sampler: as `resolve_sampler` returns it.
        output: a folder to begin or to go on with, or a file that ends in .npz.

    Raises:
        UserError: if the folder holds other samples or files, cannot be written, or if an image is not finite.
    """
    if num_images < 1 or batch_size < 1:
        raise UserError(f"--num_images is {num_images} and --batch_size {batch_size}; both must be at least 1.")
    output, state = Path(output), PartialState()
    folder = output.with_name(output.name + ".parts") if output.suffix == ".npz" else output
    record = {"schema": SCHEMA, "model": model.facts, "sampler": sampler, "num_images": num_images}
    whole = read_samples(output) if output.suffix == ".npz" and output.is_file() else None
    if whole is not None:
        found = {"model": whole.model, "sampler": whole.sampler} if whole.model else None
        check_same_samples(output, found, record)
        if len(whole.images) >= num_images:
            return output
    check_same_samples(folder, read_record(folder), record)
    state.wait_for_everyone()  # nobody looks any more when the first file is written
    if state.is_main_process:
        with writing("samples", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for k, image in enumerate([] if whole is None else to_pil(whole.images)):
                write_beside(folder / file_name(k), partial(image.save, format="PNG"))
            write_beside(folder / "samples.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    state.wait_for_everyone()
    blocks = [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
    mine = [
        block
        for block in blocks[state.process_index :: state.num_processes]
        if not all((folder / file_name(k)).is_file() for k in block)
    ]
    if mine and progress and state.is_main_process:
        left, steps = sum(map(len, mine)), sampler["num_inference_steps"]
        one_step = step_seconds(model.unet.to(state.device), len(mine[0]), DTYPES[sampler["dtype"]])
        cost = duration(one_step / len(mine[0]) * steps * left)
        print(f"{left:,} images of {sampler['method']} in {steps} steps: about {cost}.", flush=True)
    if mine:
        _draw_blocks(model, sampler, mine, folder, progress and state.is_main_process)
    state.wait_for_everyone()
    if output.suffix == ".npz" and state.is_main_process:
        images = read_samples(folder).images[:num_images].permute(0, 2, 3, 1).numpy()
        with writing("samples", output):
            # An open file: to a name numpy would append .npz once more.
            def save(path):
                with open(path, "wb") as file:
                    np.savez(file, arr_0=images, meta=np.array(json.dumps(record)))

            write_beside(output, save)
            shutil.rmtree(folder)
    state.wait_for_everyone()
    return output


def _draw_blocks(model: Pretrained, sampler: dict, blocks: list[range], folder: Path, progress: bool):
    unet, labels = model.unet.to(PartialState().device), sampler["class_labels"]
    listed = isinstance(sampler["timesteps"], list)
    options = dict(
        method=sampler["method"],
        num_inference_steps=None if listed else sampler["num_inference_steps"],
        spacing=sampler["timesteps"],
        eta=sampler["eta"] or 0.0,
        variance_type=sampler["variance_type"],
        dtype=DTYPES[sampler["dtype"]],
    )
    num_images = sum(map(len, blocks))
    with tqdm(desc=f"Sampling {num_images:,} images", total=num_images, unit="image", disable=not progress) as bar:

        def count(size, i, num_steps, *step):
            bar.update(round(size * (i + 1) / num_steps) - round(size * i / num_steps))

        for block in blocks:
            images = sample(
                unet,
                model.scheduler,
                image_generators(sampler["seed"], block),
                class_labels=None if labels is None else [labels[k % len(labels)] for k in block],
                on_step=partial(count, len(block)),
                **options,
            )
            if not images.isfinite().all():
                broken = block[int((~images.isfinite()).flatten(1).any(dim=1).nonzero()[0])]
                error = UserError(
                    f"image {broken} is not finite ({sampler['method']}, {sampler['dtype']}): take --dtype float32, "
                    "or look whether the training of this model diverged."
                )
                error.on_one_process = True
                raise error
            with writing("samples", folder):
                for k, image in zip(block, to_pil(to_uint8(images))):
                    if not (folder / file_name(k)).is_file():
                        write_beside(folder / file_name(k), partial(image.save, format="PNG"))


def duration(seconds: float) -> str:
    """Return seconds in words of the size that matters: `a second`, `8 s`, `12 min`, `3.5 h`."""
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def sample_command(arguments):
    """Run `python -m ddpm_hf sample` with its parsed flags."""
    start_processes()
    model, guidance = guided(load_pretrained(arguments.model, arguments.weights), arguments)
    sampler, warnings = resolve_sampler(model, **sampler_flags(arguments), **guidance)
    label = f"{model.facts['name'].replace('/', '--')}-{sampler['method']}{sampler['num_inference_steps']}"
    label += f"-guided{sampler['guidance_scale']:g}" if "guidance_scale" in sampler else ""
    output = arguments.output or Path("samples", f"{label}-seed{sampler['seed']}")
    for warning in warnings:
        PartialState().print(warning, flush=True)
    draw_samples(model, sampler, arguments.num_images, output, arguments.batch_size)
    if PartialState().is_main_process:
        sheet = Path(f"{output}.sheet.png")
        image_sheet(read_samples(output).images[:ON_SHEET], sheet)
        print(f"{arguments.num_images:,} images are in {output}; {sheet} shows the first.")


def guided(model: Pretrained, arguments) -> tuple[Pretrained, dict]:
    """Return the model under the guidance of --guidance_scale and --classifier, and what a record says of it."""
    scale, classifier, class_names = arguments.guidance_scale, None, model.class_names
    if arguments.classifier is not None:
        classifier = load_classifier(arguments.classifier)
        class_names = names_of(classifier.config.id2label)
    unet = guide(model.unet, model.scheduler, class_names, scale, classifier)
    facts = {"guidance_scale": scale, "classifier": None if classifier is None else weights_hash(classifier)}
    return dataclasses.replace(model, unet=unet, class_names=class_names), facts


def start_processes():
    """Join the processes of this launch, if there are several; PartialState knows of them from here on.

    Raises:
        UserError: as `check_processes`.
    """
    # Accelerator, not PartialState alone, reads ACCELERATE_USE_CPU. Who waits for scores waits up to two hours.
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    check_processes()


def check_processes():
    """Refuse a launch that would go wrong without a word.

    Raises:
        UserError: if each process would take itself for the only one and do all the work, or if the model is to be
            split among them: a network is saved, averaged and drawn from whole here.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    kind = PartialState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{kind.value} splits the model, which this cannot: launch with --multi_gpu, a GPU holds it.")
    if launched > 1 and PartialState().num_processes == 1:
        raise UserError(
            f"{launched} processes were launched without a GPU each: set ACCELERATE_USE_CPU=true for CPUs."
        )


def sampler_flags(arguments) -> dict:
    """Return the flags that `resolve_sampler` takes."""
    names = ["num_inference_steps", "timesteps", "eta", "variance_type", "dtype", "seed", "class_labels"]
    return {"method": arguments.sampler or "ddpm"} | {name: getattr(arguments, name) for name in names}
