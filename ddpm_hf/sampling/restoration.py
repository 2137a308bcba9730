"""Restore images with a model that was trained on clean images, through pipelines/restoration.py.

The images are in memory, or they are files and the results are files too. Image files are numbered in the order of
their names. Image k takes its noise from `torch.Generator().manual_seed(seed + k)`, so the other images in its batch
change its result by at most one grey level, by round-off. All images are read before any result is written. After an
interruption, the same command restores the missing images. The file restoration.json states the model, inputs and
settings of the results.
"""

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..community_pipelines import pipeline_file, pipeline_module
from ..data.decode import open_image, use_path
from ..data.survey import DARK
from ..errors import UserError, no_such, real_number, whole_number
from ..files import check_output, read_json, write_json, writing
from ..memory import in_batches, ranges
from ..models.pretrained import Pretrained, load_pretrained
from ..pictures import GAP, check_sheet, frame, image_sheet, side_by_side, to_pil
from .images_to_restore import Item, find_items, read, read_for
from .masks import read_mask, read_masks_in_memory
from .pixels import PixelFormat, pixel_format, trained_range
from .samplers import check_seed, image_generators
from .writer import writer_thread


RESTORATION_SCHEMA = "ddpm_hf.restoration/1"
RECORD = "restoration.json"
MAX_SAMPLES = 1000  # restorations of one image, which are in memory together
MAX_BLUR = 1000  # pixels, of --blur_sigma; the blur needs 8 times as many numbers for each row of an image
MAX_PIXELS = 2048**2  # of a result; a UNet keeps hundreds of numbers for each pixel
SHEET_IMAGES = 16
SHEET_COLUMNS = 8
SETTINGS = ["noise_level", "scale_factor", "blur_sigma", "num_inference_steps", "num_samples"]
TASK_OF = {"mask": "inpaint", "scale_factor": "super_resolution", "blur_sigma": "deblur"}  # settings of only one task


@dataclass(frozen=True)
class Restored:
    """The files that `restore` wrote.

    Attributes:
        num_images: how many results there are, including those of earlier calls.
        sheet: the path of a picture of the first 16 inputs, each above its result.
        noise_levels: the standard deviation of the noise of each image that this call restored, for pixels in
            [0, 1], in the order of file names.
        painted: for inpaint, the share of each image, from 0 to 1, that its mask marks for painting; otherwise [].
    """

    num_images: int
    sheet: Path
    noise_levels: list[float]
    painted: list[float]


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
    """Denoise, inpaint, enlarge, colorize or deblur images with a model that was trained on clean images.

    Results are good estimates, but not samples of the posterior: they have about half of its variance.

    Args:
        model: a folder, a checkpoint, a Hub id, or what `load` returned.
        images: PIL images, arrays or tensors that pipelines/restoration.py accepts. With `output`: the path of an
            image or of a folder of images.
        output: a .png file, or a folder. In a folder, each result has the name of its input, with the ending .png.
            Results of 5 or more channels are .npy files. None: return the results.
        task: denoise, inpaint, super_resolution, colorize or deblur.
        mask: for inpaint, a mask image, white in the areas to paint. If it has transparent parts, its opaque parts are
            the areas to paint, in any color. Give one mask for all images, or a list with one per image. With
            `output`: the path of one mask, or of a folder where each mask has the name of its image.
        batch_size: images per batch, at least 1. If memory runs out, batches are halved. The batch size changes the
            results only by round-off.
        seed: the noise of image k comes from a random generator seeded with seed + k.
        overwrite: replace results that are already in `output`.
        settings: noise_level (standard deviation on pixels in [0, 1]), scale_factor, blur_sigma (pixels),
            num_inference_steps, num_samples (restorations to average). A setting that is None or not given has the
            pipeline's default.

    Returns:
        A list of PIL images, or of arrays (H, W, C) in [0, 1] for 5 or more channels. With `output`: a `Restored`.

    Raises:
        UserError: for settings that contradict each other, images that are missing or unreadable, an output that
            already exists, images or settings that the pipeline refuses, or if memory runs out for a single image.

    Example:
        >>> noisy = ddpm_hf.sample("runs/digits", 2, "ddim", num_inference_steps=10)
        >>> len(ddpm_hf.restore("runs/digits", noisy, task="denoise"))
        2
    """
    settings = {name: plain_number(name, value) for name, value in settings.items() if value is not None}
    settings["task"] = task
    check_task_settings(settings, mask, batch_size)
    seed = check_seed(seed)
    if output is not None and not isinstance(images, (str, os.PathLike)):
        raise UserError(
            f"an output is given, but the images are given as {type(images).__name__}, not as a path: give the path "
            "of an image or of a folder of images, or leave the output out."
        )
    items = None if output is None else find_items(Path(images), check_output("OUTPUT", output), mask)
    if not isinstance(model, Pretrained):
        model = load_pretrained(model)
    if items is None:
        return restore_images(model, images, settings, mask=mask, seed=seed, batch_size=batch_size)
    place = Path(output)
    return restore_files(model, items, settings, output=place, seed=seed, batch_size=batch_size, overwrite=overwrite)


def plain_number(name: str, value):
    """Return the value of a setting as an int or a float, which JSON can hold. Other settings stay as they are.

    Raises:
        UserError: if the value is not a number, or not a whole number where one is needed.
    """
    if name in ("scale_factor", "num_inference_steps", "num_samples"):
        return whole_number(f"--{name}", value)
    if name in ("noise_level", "blur_sigma"):
        return real_number(f"--{name}", value)
    return value


def restore_images(model, images, settings: dict, *, mask, seed: int, batch_size: int) -> list:
    """Restore one image, or a list of images in batches, in memory. Return a list of PIL images or arrays."""
    pipeline = open_pipeline(model)
    output_type = "pil" if model.unet.config.in_channels <= 4 else "np"
    channels = 1 if settings["task"] == "colorize" else model.unet.config.in_channels
    given = images if isinstance(images, (list, tuple)) else [images]
    with refused_as_user_error("images"):  # one array or tensor may hold several images
        images = [image for each in given for image in pipeline_module("restoration").to_pixels(each, channels)]
    mask = read_masks_in_memory(mask)
    if isinstance(mask, (np.ndarray, torch.Tensor)):
        with refused_as_user_error("the mask", cannot="cannot be used"):
            masks = list(pipeline_module("restoration").to_pixels(mask, 1))
        mask = masks if len(masks) > 1 else masks[0]
    if isinstance(mask, (list, tuple)) and len(mask) != len(images):
        raise UserError(f"there are {len(mask)} masks for {len(images)} images: give one mask, or one for each image.")

    def restore_batch(batch: range) -> list:
        rows = slice(batch.start, batch.stop)
        masks = {} if mask is None else {"mask": mask[rows] if isinstance(mask, (list, tuple)) else mask}
        options = settings | masks | {"generator": image_generators(seed, batch), "output_type": output_type}
        with refused_as_user_error("images"):
            return list(pipeline(images[rows], **options).images)

    batches = ranges(len(images), batch_size)
    return [image for _, restored in in_batches(restore_batch, batches) for image in restored]


def restore_files(
    model: Pretrained, items: list[Item], settings: dict, *, output: Path, seed: int, batch_size: int, overwrite: bool
) -> Restored:
    """Check all items, restore the items that have no result yet, and draw a sheet of inputs and results."""
    pipeline = open_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    pixels = output_format(model, items, output)
    for item in items:
        item.pixel_range = trained_range(model)
    record = {
        "schema": RESTORATION_SCHEMA,
        "model": model.facts,
        "pipeline_sha256": hashlib.sha256(pipeline_file("restoration").read_bytes()).hexdigest(),
        "settings": settings | {"seed": seed},
        "num_images": len(items),
        **pixels.record,
        "inputs_sha256": check_items(items, pipeline, settings, seed),
    }
    sheet = output.resolve().with_name(f"{output.resolve().name}.sheet.png")
    if not overwrite:
        check_sheet(sheet, output)
    is_file = len(items) == 1 and items[0].output == output
    to_do = begin_output(items, output, record, is_file=is_file, overwrite=overwrite)
    noise_levels = restore_items(to_do, pipeline, settings, seed, batch_size, pixels=pixels)
    with writing("the sheet", output):
        draw_sheet(items[:SHEET_IMAGES], sheet, pixels.channels)
    painted = [item.painted for item in items if item.painted is not None]
    return Restored(len(items), sheet, noise_levels, painted)


def output_format(model: Pretrained, items: list[Item], output: Path) -> PixelFormat:
    """Return the format of the results: 8-bit PNG files, or .npy files if there are more than 4 channels.

    The output paths of `items` get the suffix of this format.

    Raises:
        UserError: if OUTPUT is a file with another suffix.
    """
    channels = model.unet.config.in_channels
    pixels = PixelFormat(channels) if channels <= 4 else pixel_format(model, None)
    for item in items:
        if item.output == output and output.suffix != pixels.suffix:
            raise UserError(
                f"OUTPUT is {output}, but images of {channels} channels are written as {pixels.suffix[1:]} files: "
                f"give a name ending in {pixels.suffix}."
            )
        item.output = item.output.with_suffix(pixels.suffix)
    return pixels


def open_pipeline(model: Pretrained) -> DiffusionPipeline:
    """Return the RestorationPipeline of a loaded model, on the device of this process."""
    module = pipeline_module("restoration")
    pipeline = module.RestorationPipeline(model.unet, model.scheduler.stock(), model.classes.id2label)
    return pipeline.to(PartialState().device)


def check_task_settings(settings: dict, mask, batch_size: int):
    """Raise a UserError for an unknown task, or for settings that belong to another task or are out of range."""
    task = settings["task"]
    if unknown := set(settings) - {*SETTINGS, "task"}:
        raise UserError(no_such("setting of a restoration", min(unknown), SETTINGS))
    tasks = pipeline_module("restoration").OPERATORS
    if task not in tasks:
        raise UserError(no_such("task", task, tasks))
    for name, owner in TASK_OF.items():
        if (settings.get(name) is not None or name == "mask" and mask is not None) and task != owner:
            raise UserError(f"--{name} applies only to --task {owner}, but --task is {task}: leave --{name} out.")
    if task == "inpaint" and mask is None:
        raise UserError(
            "--task inpaint needs a mask: give --mask, an image that is white in the areas to paint, or a folder of "
            "such images."
        )
    if not 0 <= settings.get("noise_level", 0) < math.inf:
        raise UserError(f"--noise_level is {settings['noise_level']}; it must be at least 0, and finite.")
    if settings.get("num_samples", 1) > MAX_SAMPLES:
        raise UserError(f"--num_samples is {settings['num_samples']}; it must be at most {MAX_SAMPLES:,}.")
    if settings.get("blur_sigma", 1) > MAX_BLUR:
        raise UserError(f"--blur_sigma is {settings['blur_sigma']:g}; it must be at most {MAX_BLUR:,} pixels.")
    if whole_number("--batch_size", batch_size) < 1:
        raise UserError(f"--batch_size is {batch_size}; it must be at least 1.")


class Accepted(Exception):
    """Stops a trial restoration after its first step.

    `check_items` raises this exception from `callback_on_step_end`. The pipeline calls this callback only after it has
    accepted the image and the settings.
    """


def check_items(items: list[Item], pipeline, options: dict, seed: int) -> str:
    """Raise a UserError if an item cannot be restored. Return the SHA-256 of all images and masks.

    Read every item, and set its size and its share of pixels to paint. Then the pipeline takes one step with the first
    image of each size.
    """

    def accept(*step):
        raise Accepted

    digest = hashlib.sha256()
    first = {}  # the first item of each size
    deep = []  # the largest value of each image of more than 8 bits
    for item in tqdm(items, desc="Reading", unit="image", disable=len(items) < 200):
        image, mask = read_for(pipeline, item, options["task"])
        item.size = tuple(image.shape[1:])
        item.painted = None if mask is None else mask.float().mean().item()
        factor = options.get("scale_factor", 2) if options["task"] == "super_resolution" else 1
        if image[0].numel() * factor**2 > MAX_PIXELS:
            raise UserError(
                f"the result of {item.path} would have more than {MAX_PIXELS / 1e6:.0f} million pixels: give a "
                "smaller image, or a part of it."
            )
        digest.update(f"{item.path.stem} {tuple(image.shape)} ".encode() + image.numpy().tobytes())
        digest.update(b"" if mask is None else mask.numpy().tobytes())
        first.setdefault(item.size, item)
        if use_path(lambda image: getattr(image, "mode", " ")[0] in "IF", item.path, open_image):
            deep.append(image.max().item())
    if deep and max(deep) < DARK:
        print(
            f"Warning: images of more than 8 bits have no pixel brighter than {max(deep):.1%} of white, so they are "
            "almost black for the model: rescale them, or give a model that was trained with their --pixel_range.",
            flush=True,
        )

    def try_step(batch: list[Item]):
        (item,) = batch
        image, mask = read_for(pipeline, item, options["task"])
        with contextlib.suppress(Accepted), refused_as_user_error(item.path.name):
            generators = image_generators(seed, [item.index])
            pipeline(image[None], **stack_masks([mask]), **options, generator=generators, callback_on_step_end=accept)

    for _ in in_batches(try_step, [[item] for item in first.values()]):
        pass
    return digest.hexdigest()


def stack_masks(masks: list[torch.Tensor | None]) -> dict:
    """Return the masks of a batch as a keyword argument of the pipeline: {"mask": (B, H, W)}, or {} without masks."""
    return {} if masks[0] is None else {"mask": torch.stack(masks)}


@contextlib.contextmanager
def refused_as_user_error(what: str, cannot: str = "cannot be restored with these flags"):
    """Turn a ValueError of the pipeline into a UserError that says what cannot be done with which image."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{what} {cannot}: {error}") from error


def begin_output(items: list[Item], output: Path, record: dict, *, is_file: bool, overwrite: bool) -> list[Item]:
    """Create the output, and return the items that have no result yet.

    Without `overwrite`, a folder whose record equals `record` is continued. Any other folder that is not empty, and an
    existing file, is a UserError.
    """
    if is_file:
        if os.path.lexists(output) and not overwrite:  # True also for a broken link
            raise UserError(f"{output} already exists: give another OUTPUT, or --overwrite to replace it.")
        with writing("the image", output):
            output.parent.mkdir(parents=True, exist_ok=True)
        return items
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        if read_json(output / RECORD, missing={}) != json.loads(json.dumps(record)):
            raise UserError(
                f"{output} is not empty, and its files are not results of this model, these images and these "
                "settings: give another OUTPUT, or --overwrite to replace files of the same names."
            )
        return [item for item in items if not item.output.exists()]
    with writing("the images", output):
        output.mkdir(parents=True, exist_ok=True)
        for item in items:  # remove old files, because a later call would count them as results
            item.output.unlink(missing_ok=True)
        write_json(output / RECORD, record)
    return items


def restore_items(
    items: list[Item], pipeline, options: dict, seed: int, batch_size: int, *, pixels: PixelFormat
) -> list[float]:
    """Restore the images, write the results, and return the noise level of each item.

    The images of a batch have the same size.
    """
    is_png = pixels.suffix == ".png"
    options = options | {"output_type": "pil" if is_png else "pt"}

    def restore_batch(batch: list[Item]):
        images, masks = zip(*(read_for(pipeline, item, options["task"]) for item in batch))
        generators = image_generators(seed, [item.index for item in batch])
        with refused_as_user_error(batch[0].path.name):
            done = pipeline(torch.stack(images), **stack_masks(masks), **options, generator=generators)
        arrays = list(map(np.atleast_3d, done.images)) if is_png else pixels.encode(2 * done.images - 1)
        return arrays, done.noise_levels.tolist()

    def save(batch: list[Item], arrays):
        for item, array in zip(batch, arrays):
            with writing("the image", item.output):
                pixels.save(array, item.output)

    noise_levels = {}
    batches = []
    for size in sorted({item.size for item in items}):
        same = [item for item in items if item.size == size]
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    pipeline.set_progress_bar_config(desc="Steps of a batch", leave=False, position=1)
    with (
        tqdm(desc=f"Restoring {len(items):,} images", total=len(items), unit="image") as bar,
        writer_thread() as write,
    ):
        for batch, (arrays, levels) in in_batches(restore_batch, batches):
            write(save, batch, arrays)
            noise_levels |= zip((item.index for item in batch), levels)
            bar.update(len(batch))
    return [noise_levels[item.index] for item in items]


def draw_sheet(items: list[Item], path: Path, channels: int) -> Path:
    """Draw a sheet with each input above its result, and return the path of the sheet.

    Inputs are enlarged to the size of their results. Their masked areas are grey.
    """
    pairs = []
    for item in items:
        given, result = (read(place, item.pixel_range, channels) for place in (item.path, item.output))
        given = given if item.mask is None else given.masked_fill(read_mask(item.mask), 0.5)
        given, result = (to_pil(side_by_side(2 * image[None] - 1))[0].convert("RGB") for image in (given, result))
        pairs.append((given.resize(result.size, Image.Resampling.NEAREST), result))
    width, height = (max(side) for side in zip(*(result.size for _, result in pairs)))
    factor = max(1, 128 // max(width, height))
    box = factor * height, factor * width
    gap = torch.full((3, GAP, box[1]), 255, dtype=torch.uint8)
    cells = [torch.cat([frame(given, *box), gap, frame(result, *box)], dim=1) for given, result in pairs]
    return image_sheet(torch.stack(cells), path, min(SHEET_COLUMNS, len(cells)))
