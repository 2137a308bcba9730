"""A set of samples on disk: how it is written, and how it is read back for scoring.

A folder has `000000.png`, `000001.png`, ... and `samples.json`, which says how they were drawn; an .npz has `arr_0`
(N, H, W, C) uint8, as the evaluators of ADM and others read it, and the same JSON as `meta`.
"""

import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..files import read_json, write_beside, write_json, writing
from ..models.pretrained import Pretrained
from ..pictures import to_pil, to_uint8
from .samplers import autocast, class_arguments, image_shape
from .settings import DTYPES, Sampler


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
        record = read_sample_record(path)
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


def read_sample_record(folder: Path) -> dict | None:
    """Return the samples.json of a folder; None without one, or with somebody else's."""
    try:
        record = read_json(folder / "samples.json")
    except UserError:
        return None
    return record if record.get("schema") == SCHEMA else None


def file_name(k: int) -> str:
    return f"{k:06d}.png"


def draw_samples(
    model: Pretrained,
    sampler: Sampler,
    num_images: int,
    output: str | Path,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Path:
    """Draw images 0..num_images-1 into a folder, or into one .npz; every process of a launch calls this.

    Image k is in block k // batch_size, and one process draws a block in one batch, whatever is there already. So a
    job that was killed ends with the same bytes as one that was not, on any number of processes.

    Args:
        sampler: resolved for this model.
        output: a folder to begin or to go on with, or a file that ends in .npz.

    Returns:
        `output` as a Path.

    Raises:
        UserError: if the folder holds other samples or files, cannot be written, or if an image is not finite.
    """
    if num_images < 1 or batch_size < 1:
        raise UserError(f"--num_images is {num_images} and --batch_size {batch_size}; both must be at least 1.")
    output, state = Path(output), PartialState()
    folder = output.with_name(output.name + ".parts") if output.suffix == ".npz" else output
    record = {
        "schema": SCHEMA,
        "model": model.facts,
        "sampler": sampler.record(model),
        "num_images": num_images,
    }
    drawn = _find_samples(output, folder, record)
    if len(drawn) >= num_images:
        return output
    state.wait_for_everyone()  # nobody looks any more when the first file is written
    if state.is_main_process:
        with writing("samples", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for k, image in enumerate(to_pil(drawn)):
                write_beside(folder / file_name(k), partial(image.save, format="PNG"))
            write_json(folder / "samples.json", record)
    state.wait_for_everyone()
    blocks = [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
    mine = [
        block
        for block in blocks[state.process_index :: state.num_processes]
        if not all((folder / file_name(k)).is_file() for k in block)
    ]
    progress = progress and state.is_main_process
    if mine:
        model.unet.to(state.device)
        if progress:
            _print_estimate(model, sampler, mine)
        _draw_blocks(model, sampler, mine, folder, progress=progress)
    state.wait_for_everyone()
    if output.suffix == ".npz" and state.is_main_process:
        _pack(folder, output, record)
    state.wait_for_everyone()
    return output


def _find_samples(output: Path, folder: Path, record: dict) -> torch.Tensor:
    """Return the images of an .npz that is there already, or none; refuse samples of another record."""
    whole = read_samples(output) if output.suffix == ".npz" and output.is_file() else None
    if whole is not None:
        found = {"model": whole.model, "sampler": whole.sampler} if whole.model else None
        check_same_samples(output, found, record)
    check_same_samples(folder, read_sample_record(folder), record)
    return torch.empty(0, 1, 1, 1, dtype=torch.uint8) if whole is None else whole.images


def _print_estimate(model: Pretrained, sampler: Sampler, blocks: list[range]):
    left = sum(map(len, blocks))
    one_step = step_seconds(sampler.network(model), len(blocks[0]), DTYPES[sampler.dtype]) / len(blocks[0])
    cost = duration(one_step * sampler.num_inference_steps * left)
    print(f"{left:,} images of {sampler.name} in {sampler.num_inference_steps} steps: about {cost}.", flush=True)


def _draw_blocks(model: Pretrained, sampler: Sampler, blocks: list[range], folder: Path, *, progress: bool):
    num_images = sum(map(len, blocks))
    with tqdm(desc=f"Sampling {num_images:,} images", total=num_images, unit="image", disable=not progress) as bar:

        def count(size, i, num_steps, *step):
            bar.update(round(size * (i + 1) / num_steps) - round(size * i / num_steps))

        for block in blocks:
            images = sampler.draw(model, block, partial(count, len(block)))
            if not images.isfinite().all():
                broken = block[int((~images.isfinite()).flatten(1).any(dim=1).nonzero()[0])]
                error = UserError(
                    f"image {broken} is not finite ({sampler.name}, {sampler.dtype}): take --dtype float32, or check "
                    "whether the training of this model diverged."
                )
                error.on_one_process = True
                raise error
            with writing("samples", folder):
                for k, image in zip(block, to_pil(to_uint8(images))):
                    if not (folder / file_name(k)).is_file():
                        write_beside(folder / file_name(k), partial(image.save, format="PNG"))


def _pack(folder: Path, output: Path, record: dict):
    """Put the images of a folder into one .npz and remove the folder."""
    images = read_samples(folder).images[: record["num_images"]].permute(0, 2, 3, 1).numpy()

    def save(path):
        with open(path, "wb") as file:  # an open file, because numpy would append .npz to a name once more
            np.savez(file, arr_0=images, meta=np.array(json.dumps(record)))

    with writing("samples", output):
        write_beside(output, save)
        shutil.rmtree(folder)


def step_seconds(unet: nn.Module, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """Return the seconds that one evaluation of a batch takes here, measured after one to warm up."""
    x = torch.zeros(batch_size, *image_shape(unet), device=unet.device, dtype=unet.dtype)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=unet.device)
    labels = class_arguments(unet, None if unet.config.num_class_embeds is None else [0] * batch_size, batch_size)
    with torch.no_grad(), autocast(unet, dtype):
        for _ in range(2):
            start = time.perf_counter()
            unet(x, timesteps, **labels).sample.sum().item()  # waits for a GPU
            seconds = time.perf_counter() - start
    return seconds


def duration(seconds: float) -> str:
    """Return seconds in words of the size that matters: `a second`, `8 s`, `12 min`, `3.5 h`."""
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
