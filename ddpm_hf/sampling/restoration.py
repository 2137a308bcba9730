"""Images restored by a model of clean ones, through pipelines/restoration.py: in memory, or a folder of files.

Image k, in the order of names, draws from `torch.Generator().manual_seed(seed + k)` alone, so it is the same (up to a
grey level of round-off) in any batch. A folder is read whole before anything is written. An interrupted one goes on:
its restoration.json says which images, model and settings the finished ones belong to.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..community_pipelines import pipeline_file, pipeline_module
from ..data.decode import to_array
from ..errors import UserError, no_such
from ..files import read_json, write_beside, write_json, writing
from ..models.pretrained import Pretrained, load_pretrained
from ..pictures import frame, image_sheet, to_uint8
from .samplers import image_generators


SCHEMA = "ddpm_hf.restoration/1"
RECORD = "restoration.json"
ON_SHEET, COLUMNS = 16, 8  # images that are shown, and in a row
TASK_OF = {"mask": "inpaint", "scale_factor": "super_resolution", "blur_sigma": "deblur"}  # settings of one task alone


@dataclass
class Item:
    """One image to restore: its number, its file, where the result goes, its mask's file (inpaint), its (H, W)."""

    index: int
    path: Path
    output: Path
    mask: Path | None
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Restored:
    """What was written: how many images, a sheet of inputs above results, and the noise of each image drawn now.

    `noise_levels` are standard deviations on pixels in [0, 1].
    """

    num_images: int
    sheet: Path
    noise_levels: list[float]


def restore(
    model: str | Path | Pretrained,
    images,
    output: str | Path | None = None,
    *,
    task: str,
    mask=None,
    batch_size: int = 16,
    seed: int = 0,
    overwrite: bool = False,
    **settings,
) -> list[Image.Image] | Restored:
    """Denoise, inpaint, enlarge, colour or deblur images with a model that was trained on clean ones.

    Args:
        model: a folder, a checkpoint, a Hub id, or what `load` returned.
        images: PIL images, arrays or tensors as pipelines/restoration.py takes them; or, with `output`, the path of an
            image or of a folder of images.
        output: a .png file, or a folder: each result has its input's name and ends in .png. None: results in memory.
        task: denoise, inpaint, super_resolution, colorize or deblur: what has happened to the images.
        mask: of inpaint, white where to paint: an image, or with `output` a path: one for all, or a folder of one
            for each name.
        batch_size: images at a time; it changes nothing else.
        seed: image k is drawn from the generator seeded with seed + k.
        overwrite: replace results that are in `output`.
        settings: noise_level (standard deviation on pixels in [0, 1]), scale_factor, blur_sigma (pixels),
            num_inference_steps, num_samples (how many restorations are averaged); None: the pipeline's own.

    Returns:
        PIL images, or with `output` what was written.

    Raises:
        UserError: for settings that do not go together, images that are missing or unreadable, an output that is
            there already, and what the pipeline refuses.

    Example:
        >>> noisy = ddpm_hf.sample("runs/digits", 2, "ddim", num_inference_steps=10)
        >>> len(ddpm_hf.restore("runs/digits", noisy, task="denoise"))
        2
    """
    settings = {name: value for name, value in settings.items() if value is not None} | {"task": task}
    check_task_settings(settings, mask, batch_size)
    items = None if output is None else find_items(Path(images), Path(output), mask)
    if not isinstance(model, Pretrained):
        model = load_pretrained(model)
    pipeline = open_pipeline(model)
    if items is not None:
        return restore_files(
            pipeline,
            model,
            items,
            settings,
            output=Path(output),
            seed=seed,
            batch_size=batch_size,
            overwrite=overwrite,
        )
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    images = list(images) if several else [images]
    restored = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        generators = image_generators(seed, range(start, start + len(batch)))
        of_batch = mask[start : start + batch_size] if isinstance(mask, (list, tuple)) else mask
        masks = {} if mask is None else {"mask": of_batch}
        with refused_as_user_error("images"):
            restored += pipeline(batch, **masks, **settings, generator=generators).images
    return restored


def restore_files(
    pipeline, model: Pretrained, items: list[Item], settings: dict, *, output: Path, seed: int, batch_size, overwrite
) -> Restored:
    """Restore images from files to files: refuse first, then restore those without a result, then draw a sheet."""
    pipeline.set_progress_bar_config(disable=True)
    record = {
        "schema": SCHEMA,
        "model": model.facts,
        "pipeline_sha256": hashlib.sha256(pipeline_file("restoration").read_bytes()).hexdigest(),
        "settings": settings | {"seed": seed},
        "num_images": len(items),
        "inputs_sha256": check_items(items, pipeline, settings, seed),
    }
    is_file = len(items) == 1 and items[0].output == output
    to_do = begin(items, output, record, is_file=is_file, overwrite=overwrite)
    noise_levels = restore_items(to_do, pipeline, settings, seed, batch_size)
    with writing("the sheet", output):
        sheet = draw_sheet(items[:ON_SHEET], output.resolve().with_name(f"{output.resolve().name}.sheet.png"))
    return Restored(len(items), sheet, noise_levels)


def open_pipeline(model: Pretrained) -> DiffusionPipeline:
    """Return pipelines/restoration.py around a loaded model, on the device of this process."""
    module = pipeline_module("restoration")
    pipeline = module.RestorationPipeline(model.unet, model.scheduler.stock(), model.classes.id2label)
    return pipeline.to(PartialState().device)


def check_task_settings(settings: dict, mask, batch_size: int):
    """Refuse, with a UserError, settings that belong to another task, or that are out of range."""
    task, tasks = settings["task"], pipeline_module("restoration").OPERATORS
    if task not in tasks:
        raise UserError(no_such("task", task, tasks))
    for name, owner in TASK_OF.items():
        if (settings.get(name) is not None or name == "mask" and mask is not None) and task != owner:
            raise UserError(f"--{name} belongs to --task {owner}, and --task is {task}: leave it out.")
    if task == "inpaint" and mask is None:
        raise UserError("--task inpaint needs --mask: an image, or a folder of one per image, white where to paint.")
    if not settings.get("noise_level", 0) >= 0:
        raise UserError(f"--noise_level is {settings['noise_level']}; it must be at least 0.")
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}; it must be at least 1.")


def find_items(place: Path, output: Path, mask: str | Path | None) -> list[Item]:
    """Return what is to be restored, by name: the images right inside a folder, or one file."""
    if place.is_file():
        if output.resolve() == place.resolve():
            raise UserError(f"OUTPUT {output} is INPUT itself: give another name.")
        if output.suffix != ".png" or output.is_dir():
            raise UserError(f"OUTPUT is {output}, but an image is written as PNG: give a name ending in .png.")
        return [Item(0, place, output, find_mask(place, mask))]
    if not place.is_dir():
        raise UserError(f"INPUT {place} is neither a file nor a folder: give an image or a folder of images.")
    if output.is_file() or output.resolve() == place.resolve():
        raise UserError(f"OUTPUT {output} is a file or INPUT itself: give another folder.")
    paths = images_in(place)
    if not paths:
        raise UserError(f"INPUT {place} holds no image: give an image or a folder with images right inside.")
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"INPUT {place} has several images named {min(twice)}, and results have names alike: rename.")
    masks = [find_mask(path, mask) for path in paths]
    return [Item(k, path, output / f"{path.stem}.png", mask) for k, (path, mask) in enumerate(zip(paths, masks))]


def images_in(folder: Path) -> list[Path]:
    """Return the files of a folder, by name, whose suffix is that of a format that Pillow reads."""
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in files if path.suffix.lower() in readable)


def find_mask(path: Path, mask: str | None) -> Path | None:
    """Return the mask's file of the image `path`: `mask` itself, or the one of the same name in the folder `mask`."""
    if mask is None or Path(mask).is_file():
        return mask and Path(mask)
    found = [file for file in images_in(Path(mask)) if file.stem == path.stem] if Path(mask).is_dir() else []
    if len(found) != 1:
        raise UserError(f"--mask {mask} has no mask for {path.name}: give an image, or a folder of one {path.stem}.*.")
    return found[0]


def read(path: Path) -> torch.Tensor:
    """Return an image as float32 (C, H, W) in [0, 1], upright, on white; C is 1 where all of it is grey."""
    try:
        array = to_array(Image.open(path), 3, exact=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise UserError(f"{path} cannot be read ({error}): mend it or take it out.") from error
    image = torch.from_numpy(np.array(array)).permute(2, 0, 1)
    return image[:1] if (image == image[:1]).all() else image


def read_mask(path: Path) -> torch.Tensor:
    """Return a mask as bool (H, W), True where it is white, or brighter than half of its brightest: there to paint.

    Raises:
        UserError: if it is black everywhere.
    """
    grey = read(path).mean(dim=0)
    if not grey.any():
        raise UserError(f"--mask {path} is white nowhere: give one that is white where the image is to be painted.")
    return grey > grey.max() / 2


def read_for(pipeline, item: Item, task: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return an image with as many channels as its task and the model want, and its mask, or None.

    Raises:
        UserError: for colour where grey is wanted, or a mask of another size.
    """
    image, channels = read(item.path), 1 if task == "colorize" else pipeline.unet.config.in_channels
    if len(image) > channels:
        why = "colorize takes grey images" if task == "colorize" else "the model has images of one channel"
        raise UserError(f"{item.path} has colours, but {why}: convert it to grey, or take it out.")
    mask = None if item.mask is None else read_mask(item.mask)
    if mask is not None and mask.shape != image.shape[1:]:
        (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
        sizes = f"{mask_width}x{mask_height}, but {item.path.name} is {width}x{height}"
        raise UserError(f"--mask {item.mask} is {sizes}: give one of the same size.")
    return image.expand(channels, -1, -1), mask


class Accepted(Exception):
    """Ends a trial of the pipeline after its first step: it has refused nothing."""


def check_items(items: list[Item], pipeline, options: dict, seed: int) -> str:
    """Read all images and masks, try the pipeline on one of each size, note the sizes; return a hash of what was read.

    Raises:
        UserError: for the first image that cannot be restored.
    """

    def accept(*step):
        raise Accepted

    digest, first = hashlib.sha256(), {}
    for item in tqdm(items, desc="Reading", unit="image", disable=len(items) < 200):
        image, mask = read_for(pipeline, item, options["task"])
        item.size = tuple(image.shape[1:])
        digest.update(f"{item.path.stem} {tuple(image.shape)} ".encode() + image.numpy().tobytes())
        digest.update(b"" if mask is None else mask.numpy().tobytes())
        first.setdefault(item.size, item)
    for item in first.values():
        image, mask = read_for(pipeline, item, options["task"])
        with contextlib.suppress(Accepted), refused_as_user_error(item.path.name):
            generators = image_generators(seed, [item.index])
            pipeline(image[None], **masks([mask]), **options, generator=generators, callback_on_step_end=accept)
    return digest.hexdigest()


def masks(of_images: list[torch.Tensor | None]) -> dict:
    return {} if of_images[0] is None else {"mask": torch.stack(of_images)}


@contextlib.contextmanager
def refused_as_user_error(what: str):
    """Turn what the pipeline refuses, which is a ValueError, into a sentence that names the image."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{what} cannot be restored with these flags: {error}") from error


def begin(items: list[Item], output: Path, record: dict, *, is_file: bool, overwrite: bool) -> list[Item]:
    """Return the items without a result yet; begin the folder, or go on with it if its record is the same.

    Raises:
        UserError: if there is something else already, and no --overwrite; if nothing can be written there.
    """
    if is_file:
        if output.exists() and not overwrite:
            raise UserError(f"{output} is there already: give another OUTPUT, or --overwrite to replace it.")
        with writing("the image", output):
            output.parent.mkdir(parents=True, exist_ok=True)
        return items
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        if read_json(output / RECORD, missing={}) != json.loads(json.dumps(record)):
            raise UserError(
                f"{output} holds something else than results of this model, these images and these settings: give "
                "another OUTPUT, or --overwrite to replace files of the same names."
            )
        return [item for item in items if not item.output.exists()]
    with writing("the images", output):
        output.mkdir(parents=True, exist_ok=True)
        for item in items:  # an old file would pass for a result of what is about to begin
            item.output.unlink(missing_ok=True)
        write_json(output / RECORD, record)
    return items


def restore_items(items: list[Item], pipeline, options: dict, seed: int, batch_size: int) -> list[float]:
    """Restore and write the images, those of one size together; return their noise levels."""
    noise_levels, batches = [], []
    for size in sorted({item.size for item in items}):
        same = [item for item in items if item.size == size]
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    pipeline.set_progress_bar_config(desc="Steps of a batch", leave=False, position=1)
    with tqdm(desc=f"Restoring {len(items):,} images", total=len(items), unit="image") as bar:
        for batch in batches:
            images, of_images = zip(*(read_for(pipeline, item, options["task"]) for item in batch))
            generators = image_generators(seed, [item.index for item in batch])
            with refused_as_user_error(batch[0].path.name):
                done = pipeline(torch.stack(images), **masks(of_images), **options, generator=generators)
            for item, image in zip(batch, done.images):
                with writing("the image", item.output):
                    write_beside(item.output, partial(image.save, format="PNG"))
            noise_levels += done.noise_levels.tolist()
            bar.update(len(batch))
    return noise_levels


def draw_sheet(items: list[Item], path: Path) -> Path:
    """Draw each image above its result: as it came, enlarged to the same size, grey where it is masked."""
    pairs = []
    for item in items:
        given, result = read(item.path), Image.open(item.output).convert("RGB")
        given = given if item.mask is None else given.masked_fill(read_mask(item.mask), 0.5)
        array = to_uint8(2 * given - 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
        pairs.append((Image.fromarray(array).resize(result.size, Image.Resampling.NEAREST), result))
    side, columns = max(128, *(max(result.size) for _, result in pairs)), min(COLUMNS, len(pairs))
    cells = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns] + [(None, None)] * (start + columns - len(pairs))
        cells += [frame(image, side) for kind in zip(*row) for image in kind]
    return image_sheet(torch.stack(cells), path, columns)
