"""A set of samples on disk: how it is written, and how it is read back for scoring.

A folder has `000000.png`, `000001.png`, ... and `samples.json`, which says how they were drawn; an .npz has `arr_0`
(N, H, W, C) uint8, as the evaluators of ADM and others read it, and the same JSON as `meta`.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from . import UserError


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
