"""Write a set of samples to disk, and read it back for scoring.

A folder holds `000000.png`, `000001.png`, ... and `samples.json`, a record of how these images were drawn. An .npz
file holds the images as `arr_0`, uint8 (N, H, W, C), the format of ADM's evaluator. Its `meta` is the same record.
Images that PNG cannot store are `000000.npy`, `000001.npy`, ... See pixels.py for 16-bit and float pixels.
"""

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..data.decode import opacity, open_image, use_path
from ..errors import UserError, whole_number
from ..files import check_output, parse_json, read_json, read_npz, write_json, write_npz, writing
from ..locks import LOCK, check_unlocked, locked
from ..memory import in_batches, ranges
from ..models.pretrained import Pretrained
from .batches import batch_size_of, draw_in_batches
from .pixels import PixelFormat, is_format, pixel_format, recorded_format
from .samplers import autocast, class_arguments, image_shape
from .settings import DTYPES, Sampler
from .writer import writer_thread


SAMPLES_SCHEMA = "ddpm_hf.samples/1"
MAX_IMAGES = 10_000_000
SECOND_WRITER = "wait until it is done, or give another --output (for `evaluate`, another --samples_dir)"


@dataclass
class SampleSet:
    """Images, uint8 (N, C, H, W), in the order of their indices.

    `sampler` and `model` are records of the sampler and the model that drew the images. An unknown record is {}.
    """

    images: torch.Tensor
    sampler: dict
    model: dict


def check_same_samples(place: Path, found: dict | None, wanted: dict):
    """Raise a UserError if `place` holds other files, or samples that were drawn in another way.

    Args:
        found: the record of the samples in `place`; None if it has no record.
        wanted: the record of the samples to add.
    """
    if found is None:
        if place.is_file() or place.is_dir() and any(path.name != LOCK for path in place.iterdir()):
            raise UserError(f"{place} already exists and is not a set of samples of ddpm_hf: give another --output.")
        return
    pairs = [("the weights", found["model"]["unet_sha256"], wanted["model"]["unet_sha256"])]
    if "schedule" in found["model"]:  # earlier versions did not record it
        pairs += [("the noise schedule", found["model"]["schedule"], wanted["model"]["schedule"])]
    pairs += [("the pixels", found.get("pixels"), wanted.get("pixels"))]
    keys = found["sampler"] | wanted["sampler"]  # a record without guidance has no guidance_scale
    pairs += [(key, found["sampler"].get(key), wanted["sampler"].get(key)) for key in keys]
    for what, there, here in pairs:
        if there != here:
            raise UserError(
                f"{place} has other samples ({what}: {there} for those samples, {here} for the new ones): give "
                "another --output."
            )


def read_samples(path) -> SampleSet:
    """Read samples from a folder of PNG files, which may be in subfolders, or from an .npz file.

    An .npz file holds the images as `arr_0`, or as its first array, uint8 (N, H, W, C).

    Raises:
        UserError: if there are no images, if some are missing, if they differ in size or mode, if they are floats and
            no record states their range, or if they are in a lossy format.
    """
    path = Path(path)
    array, record = _read_arrays(path)
    images = (recorded_format(record) or PixelFormat(array.shape[-1])).decode(array)
    record = record or {"sampler": {}, "model": {}}
    return SampleSet(images, record["sampler"], record["model"])


def _read_arrays(path: Path) -> tuple[np.ndarray, dict | None]:
    """Return the images of an .npz file or a folder as stored, (N, H, W, C), and their record (or None)."""
    if path.suffix == ".npz":
        return _read_npz(path)
    record = read_sample_record(path)
    return _read_folder(path, record), record


def _read_npz(path: Path) -> tuple[np.ndarray, dict | None]:
    """Return the images of an .npz file, (N, H, W, C), and its record, or None if it has no record."""

    def choose(names: list[str]) -> list[str]:
        return ["arr_0" if "arr_0" in names else names[0], *(["meta"] if "meta" in names else [])]

    arrays = read_npz(path, choose, "give an .npz file with uint8 images (N, H, W, C) as arr_0")
    meta = str(arrays.pop("meta", ""))
    if not arrays:
        raise UserError(f"{path} has a record but no images: give an .npz with uint8 images (N, H, W, C) as arr_0.")
    (array,) = arrays.values()
    try:
        content = parse_json(meta)
    except ValueError:  # the meta of another program
        content = None
    record = _checked_record(content, path)
    pixels = recorded_format(record) or PixelFormat(array.shape[-1] if array.ndim == 4 else 0)
    if array.dtype != pixels.type:
        raise UserError(
            f"{path} holds {array.dtype} numbers, and their range is unknown: give uint8 images, e.g. "
            "round((x + 1) * 127.5) for x in [-1, 1]."
        )
    wanted = (1, 3) if not record or "pixels" not in record else (pixels.channels,)
    if array.ndim != 4 or array.shape[-1] not in wanted or not array.size:
        raise UserError(
            f"{path} holds an array of shape {array.shape}: give images of shape (N, H, W, C) with C = "
            f"{' or '.join(map(str, wanted))}."
        )
    return array, record


def _read_folder(folder: Path, record: dict | None) -> np.ndarray:
    """Return the images in the PNG files of a folder, or of its subfolders, (N, H, W, C), in the order of names.

    With a record, only as many images are read as it states. Their files are .png or .npy, as the record says.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a folder of PNG files, or an .npz.")
    files = find_pngs(folder) if record is None else []
    if record is not None:  # do not read more files: an earlier run with a larger num_images may have left some
        pixels = recorded_format(record)
        suffix = ".png" if pixels is None else pixels.suffix
        # Look at the files that are there, because a damaged record can ask for millions.
        numbers = [int(path.stem) for path in folder.glob(f"*{suffix}") if re.fullmatch(r"\d{6,8}", path.stem)]
        numbers = sorted({k for k in numbers if k < record["num_images"]})
        files = [path for k in numbers if (path := folder / file_name(k, suffix)).is_file()]
        if len(files) < record["num_images"]:
            raise UserError(
                f"{folder} has only {len(files)} of {record['num_images']} images: run the same `sample` command "
                "again to draw the others."
            )
    near = [path for place in {folder, *(path.parent for path in files)} for path in place.iterdir()]
    lossy = [path for path in near if path.suffix.lower() in (".jpg", ".jpeg", ".webp")]
    if lossy:
        raise UserError(
            f"{folder} has images in a lossy format ({lossy[0].name}), and compression artifacts change the scores: "
            "save the images as PNG files."
        )
    if not files:
        raise UserError(f"{folder} has no PNG files: give a folder of samples, an .npz, or a model.")
    if record is not None and pixels is not None:
        return _read_recorded(files, pixels)
    arrays = []
    kind = None
    for path in tqdm(files, desc="Reading samples", unit="image", disable=len(files) < 2000):
        mode, array = use_path(grey_or_color, path)
        if mode not in ("L", "RGB"):
            raise UserError(f"{path} has the mode {mode}: give 8-bit grey (L) or RGB images without transparency.")
        kind = kind or (mode, array.shape)
        if (mode, array.shape) != kind:
            raise UserError(
                f"{folder} mixes images of different sizes or modes ({files[0].name} is {kind[0]} "
                f"{kind[1][1]}x{kind[1][0]}, {path.name} is {mode} {array.shape[1]}x{array.shape[0]}): give images of "
                "one size and mode."
            )
        arrays.append(array if array.ndim == 3 else array[..., None])
    return np.stack(arrays)


def _read_recorded(files: list[Path], pixels: PixelFormat) -> np.ndarray:
    """Return the images in files of this format, (N, H, W, C)."""
    arrays = []
    for path in tqdm(files, desc="Reading samples", unit="image", disable=len(files) < 2000):
        array = use_path(np.array, path, open_image)
        array = array if array.ndim == 3 else array[..., None]
        arrays.append(array)
        if array.dtype != pixels.type or array.shape[-1] != pixels.channels or array.shape != arrays[0].shape:
            raise UserError(
                f"{path} holds {array.dtype} {array.shape}, but the record says {pixels.type} with {pixels.channels} "
                "channels: draw these samples again."
            )
    return np.stack(arrays)


def find_pngs(folder: Path) -> list[Path]:
    """Return the sorted PNG files of a folder. If it has none, return those of its subfolders, e.g. one per class.

    Raises:
        UserError: if a subfolder is a set of samples of its own, or if the folder and a subfolder have PNG files.
    """
    direct, nested = (
        [path for path in sorted(folder.glob(names)) if path.suffix.lower() == ".png" and path.name[0] != "."]
        for names in ("*", "*/*")
    )
    if (folder / "train_config.json").exists():  # the subfolders of a run hold sheets and figures
        nested = []
    if direct and nested:
        raise UserError(
            f"{folder} has PNG files directly in it and in its subfolder {nested[0].parent.name}: give a folder that "
            "has them in only one of these places."
        )
    if sets := [path.parent for path in nested if (path.parent / "samples.json").exists()]:
        raise UserError(f"{folder} has sets of samples in its subfolders: give one of them, e.g. {sets[0]}.")
    return [path for path in direct or nested if path.is_file()]


def grey_or_color(image) -> tuple[str, np.ndarray]:
    """Return the mode and the pixels of a Pillow image, converted to L or RGB if this loses nothing."""
    mode = {"1": "L", "LA": "L", "P": "RGB", "RGBA": "RGB"}.get(image.mode)
    alpha = opacity(image)
    if mode and (alpha is None or alpha.min() == 255):
        image = image.convert(mode)
    return image.mode, np.asarray(image)


def read_sample_record(folder: Path) -> dict | None:
    """Return the content of samples.json in a folder, or None if the file is missing or from another program."""
    try:
        record = read_json(folder / "samples.json")
    except UserError:
        return None
    return _checked_record(record, folder / "samples.json")


def _checked_record(content, path: Path) -> dict | None:
    """Return the content of a record of samples, or None if another program wrote it.

    Raises:
        UserError: for a record of ddpm_hf with entries that `draw_samples` does not write.
    """
    if not isinstance(content, dict) or content.get("schema") != SAMPLES_SCHEMA:
        return None
    sampler, model, count = (content.get(key) for key in ("sampler", "model", "num_images"))
    is_whole = isinstance(sampler, dict) and isinstance(model, dict) and type(count) is int
    is_whole = is_whole and ("pixels" not in content or is_format(content["pixels"]))
    if is_whole and 1 <= count <= MAX_IMAGES and isinstance(model.get("unet_sha256"), str) and _is_sampler(sampler):
        return content
    raise UserError(f"the record in {path} is damaged: remove it, or draw these samples again.")


def _is_sampler(sampler: dict) -> bool:
    """Return whether the record of a sampler has the entries that we read, with the types of `Sampler.record`.

    The entry "method", the name of the sampler, must be short and of plain characters, because file names contain it.
    """
    method, steps, labels, names = (
        sampler.get(key) for key in ("method", "num_inference_steps", "class_labels", "class_names")
    )
    is_named = isinstance(method, str) and re.fullmatch(r"[\w+-]{1,40}", method) and type(steps) is int
    if not is_named or not isinstance(labels or [], list) or not isinstance(names or [], list):
        return False
    most = len(names) if names else 10**9
    is_labelled = all(type(label) is int and 0 <= label < most for label in labels or [])
    return is_labelled and all(isinstance(name, str) for name in names or [])


def file_name(k: int, suffix: str = ".png") -> str:
    """Return the name of image k in a folder of samples."""
    return f"{k:06d}{suffix}"


def check_count(num_images: int) -> int:
    """Return the number of images as an int. Raise a UserError if it is below 1 or above MAX_IMAGES."""
    num_images = whole_number("--num_images", num_images)
    if num_images < 1:
        raise UserError(f"--num_images is {num_images}; it must be at least 1.")
    if num_images > MAX_IMAGES:
        raise UserError(f"--num_images is {num_images}; a set of samples has at most {MAX_IMAGES:,} images.")
    return num_images


def draw_samples(
    model: Pretrained,
    sampler: Sampler,
    num_images: int,
    output: str | Path,
    *,
    batch_size: int | str = 64,
    pixel_type: str | None = "uint8",
) -> Path:
    """Draw images 0..num_images-1 into a folder or an .npz file, and return its path.

    Every process must call this function. Image k belongs to block k // batch_size. If an image of a block is missing,
    the whole block is drawn, in one batch on one process. A job that was killed and started again therefore ends with
    the same bytes, on any number of processes. If memory runs out, a block is drawn in several batches, and pixels
    may differ by round-off.

    Args:
        sampler: a resolved `Sampler`.
        batch_size: images per batch, or "auto", as in `sample`.
        output: a folder, which may hold some of these images already, or a file that ends in .npz.
        pixel_type: see `pixel_format`.

    Raises:
        UserError: if `output` holds other samples or other files, if another process is writing to it, if it cannot be
            written, if an image has pixels that are not finite, or if memory runs out for a single image.
    """
    num_images = check_count(num_images)
    batch_size = batch_size_of(batch_size, num_images)
    output = check_output("--output", output)
    state = PartialState()
    folder = output.with_name(output.name + ".parts") if output.suffix == ".npz" else output
    pixels = pixel_format(model, pixel_type)
    record = {
        "schema": SAMPLES_SCHEMA,
        "model": model.facts,
        "sampler": sampler.record(model),
        "num_images": num_images,
        **pixels.record,
    }
    check_unlocked(output, SECOND_WRITER)
    drawn = _read_drawn(output, folder, record)
    if len(drawn) >= num_images:
        return output
    model.unet.to(state.device)
    # Time one call on every process, before anything is written. This also checks that the model can draw, and finds
    # how many images fit into memory.
    first, seconds = _time_call(model, sampler, min(batch_size, num_images))
    state.wait_for_everyone()  # the main process must not write to the folder before all processes have read it
    with contextlib.ExitStack() as lock:
        if state.is_main_process:
            with writing("samples", folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(locked(output, SECOND_WRITER))
                drawn = _read_drawn(output, folder, record)  # again, because it may have changed before the lock
                for k, image in enumerate(drawn):
                    pixels.save(image, folder / file_name(k, pixels.suffix))
                write_json(folder / "samples.json", record)
        state.wait_for_everyone()
        blocks = ranges(num_images, batch_size)
        mine = [
            block
            for block in blocks[state.process_index :: state.num_processes]
            if not all((folder / file_name(k, pixels.suffix)).is_file() for k in block)
        ]
        if mine:
            if state.is_main_process:
                _print_estimate(sampler, mine, seconds / first)
            _draw_blocks(model, sampler, mine, folder, pixels, most=first)
        state.wait_for_everyone()
        if output.suffix == ".npz" and state.is_main_process:
            _pack(folder, output, record)
    state.wait_for_everyone()
    return output


def _read_drawn(output: Path, folder: Path, record: dict) -> np.ndarray:
    """Return the images that an .npz file `output` already holds, (N, H, W, C). N is 0 for any other `output`.

    Raises:
        UserError: if `output` or `folder` holds other samples than `record` describes.
    """
    drawn = np.empty((0, 1, 1, 1))
    if output.suffix == ".npz" and output.is_dir():
        raise UserError(f"--output {output} is a folder, but a name ending in .npz must be a file: give another name.")
    if output.suffix == ".npz" and output.is_file():
        drawn, found = _read_npz(output)
        check_same_samples(output, found, record)
    check_same_samples(folder, read_sample_record(folder), record)
    return drawn


def _time_call(model: Pretrained, sampler: Sampler, batch_size: int) -> tuple[int, float]:
    """Return how many images fit into memory, at most `batch_size`, and the seconds of one step with them."""

    def time_call(batch: range) -> float:
        return step_seconds(sampler.network(model), len(batch), DTYPES[sampler.dtype], sampler.size)

    batch, seconds = next(in_batches(time_call, [range(batch_size)]))
    return len(batch), seconds


def _print_estimate(sampler: Sampler, blocks: list[range], one_image: float):
    """Print how long drawing these blocks will take. `one_image` is the seconds that a step takes per image."""
    left = sum(map(len, blocks))
    cost = duration(one_image * sampler.num_inference_steps * left)
    steps = f"{sampler.num_inference_steps} steps in {sampler.dtype}"
    print(f"{left:,} images of {sampler.name} in {steps}: about {cost}.", flush=True)


def _draw_blocks(
    model: Pretrained, sampler: Sampler, blocks: list[range], folder: Path, pixels: PixelFormat, *, most: int
):
    """Draw these blocks, at most `most` images together, and write the images that are not in the folder yet."""

    def save(numbers, images):
        with writing("samples", folder):
            for k, image in zip(numbers, images):
                if not (folder / file_name(k, pixels.suffix)).is_file():
                    pixels.save(image, folder / file_name(k, pixels.suffix))

    options = {"most": most, "progress": PartialState().is_main_process}
    with writer_thread() as write:
        for batch in draw_in_batches(model, sampler, blocks, pixels.encode, **options):
            write(save, *batch)


def _pack(folder: Path, output: Path, record: dict):
    """Write the images of a folder to one .npz file, then remove the folder."""
    images = _read_folder(folder, record)
    with writing("samples", output):
        write_npz(output.resolve(), arr_0=images, meta=json.dumps(record))
        shutil.rmtree(folder)


def step_seconds(unet: nn.Module, batch_size: int, dtype: torch.dtype, size: tuple[int, int] | None = None) -> float:
    """Return how many seconds one call of the UNet on a batch takes. A first call, to warm up, is not counted.

    Args:
        size: (H, W) of the images. None: the size that the UNet was trained on.

    Raises:
        UserError: if the UNet's output is not finite.
    """
    x = torch.zeros(batch_size, *image_shape(unet, size), device=unet.device, dtype=unet.dtype)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=unet.device)
    labels = class_arguments(unet, None if unet.config.num_class_embeds is None else [0] * batch_size, batch_size)
    with torch.no_grad(), autocast(unet, dtype):
        for _ in range(2):
            start = time.perf_counter()
            is_finite = unet(x, timesteps, **labels).sample.isfinite().all().item()  # waits until the GPU is done
            seconds = time.perf_counter() - start
    if not is_finite:
        raise UserError(
            f"the UNet of this model predicts numbers that are not finite ({str(dtype).removeprefix('torch.')}): give "
            "--dtype float32, or check whether the training of this model diverged."
        )
    return seconds


def duration(seconds: float) -> str:
    """Return a duration in words, rounded: `a second`, `8 s`, `12 min` or `3.5 h`."""
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
