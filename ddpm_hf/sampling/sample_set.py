"""A set of samples on disk: how it is written, and how it is read back for scoring.

A folder has `000000.png`, `000001.png`, ... and `samples.json`, which says how they were drawn; an .npz has `arr_0`
(N, H, W, C) uint8, as the evaluators of ADM and others read it, and the same JSON as `meta`.
"""

import json
import shutil
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..errors import UserError
from ..files import write_beside, writing
from ..models.pretrained import Pretrained
from ..pictures import to_pil, to_uint8
from .generate import duration, step_seconds
from .samplers import image_generators, sample
from .settings import DTYPES


SCHEMA = "ddpm_hf.samples/1"


@dataclass
class SampleSet:
    """Images uint8 (N, C, H, W) in the order of their numbers, and what was told of them ({} if nothing was)."""

    images: torch.Tensor
    sampler: dict
    model: dict


def check_same_samples(place: Path, found: dict | None, wanted: dict):
    """Refuse to mix samples: `found` is the record of those already there.

    Raises:
        UserError: naming the first thing that differs.
    """
    if found is None:
        if place.is_file() or place.is_dir() and any(place.iterdir()):
            raise UserError(f"{place} is there already and holds no samples of ours: give another --output.")
        return
    pairs = [("the weights", found["model"]["unet_sha256"], wanted["model"]["unet_sha256"])]
    keys = found["sampler"] | wanted["sampler"]  # guidance is told only where there is some
    pairs += [(key, found["sampler"].get(key), wanted["sampler"].get(key)) for key in keys]
    for what, there, here in pairs:
        if there != here:
            raise UserError(
                f"{place} holds samples of another kind ({what}: {there} there, {here} here): give another --output."
            )


def read_samples(path) -> SampleSet:
    """Read a folder of PNG files, or an .npz with `arr_0` (or its only array) uint8 (N, H, W, C).

    Raises:
        UserError: for a place without images, JPEG files, images of several sizes or modes, floats, an unfinished set.
    """
    path = Path(path)
    if path.suffix == ".npz":
        images, record = _read_npz(path)
    else:
        record = read_record(path)
        images = _read_folder(path, record)
    record = record or {"sampler": {}, "model": {}}
    return SampleSet(images, record["sampler"], record["model"])


def _read_npz(path: Path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = "arr_0" if "arr_0" in arrays else arrays.files[0]
            array, meta = arrays[name], str(arrays["meta"]) if "meta" in arrays else None
    except (OSError, ValueError, IndexError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz: give one with uint8 images (N, H, W, C) as arr_0.") from error
    if array.dtype != np.uint8:
        raise UserError(
            f"{path} holds {array.dtype}, which could be of any range: give uint8 images, round((x + 1) 127.5)."
        )
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or not len(array):
        raise UserError(f"{path} holds an array of shape {array.shape}: give images (N, H, W, C), C = 1 or 3.")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), json.loads(meta) if meta else None


def _read_folder(folder: Path, record: dict | None) -> torch.Tensor:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give a folder of PNG files, or an .npz.")
    files = sorted(folder.glob("*.png"))
    if record is not None:  # there may be more, of a larger job that was given up
        wanted = [folder / file_name(k) for k in range(record["num_images"])]
        files = [path for path in wanted if path.is_file()]
        if len(files) < len(wanted):
            raise UserError(
                f"{folder} has {len(files)} of {len(wanted)} images: run the same `sample` again to finish it."
            )
    lossy = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".webp")]
    if lossy:
        raise UserError(
            f"{folder} has lossy images ({lossy[0].name}), whose artefacts a score would measure: save samples as PNG."
        )
    if not files:
        raise UserError(f"{folder} has no PNG files: give a folder of samples, an .npz, or a model.")
    arrays, kind = [], None
    for path in tqdm(files, desc="Reading samples", unit="image", disable=len(files) < 2000):
        try:
            with Image.open(path) as image:
                mode, array = image.mode, np.asarray(image)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}): take it out or draw it again.") from error
        if mode not in ("L", "RGB"):
            raise UserError(f"{path} is of mode {mode}: give 8-bit grey (L) or RGB images.")
        kind = kind or (mode, array.shape)
        if (mode, array.shape) != kind:
            raise UserError(
                f"{folder} mixes images: {files[0].name} is {kind[0]} {kind[1][1]}x{kind[1][0]}, {path.name} "
                f"{mode} {array.shape[1]}x{array.shape[0]}: give images of one size and mode."
            )
        arrays.append(array if array.ndim == 3 else array[..., None])
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_record(folder: Path) -> dict | None:
    """Return the samples.json of a folder; None without one, or with somebody else's."""
    path = folder / "samples.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def file_name(k: int) -> str:
    return f"{k:06d}.png"


def draw_samples(model: Pretrained, sampler: dict, num_images: int, output, batch_size: int, progress=True) -> Path:
    """Draw images 0..num_images-1 into a folder, or into one .npz; every process of a launch calls this.

    Image k lies in block k // batch_size, and a block is drawn by one process in one batch, whatever is there already:
    so a job that was killed ends with the same bytes as one that was not, on any number of processes.

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
