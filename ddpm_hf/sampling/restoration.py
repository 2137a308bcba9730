"""Images restored by a model of clean ones: `python -m ddpm_hf restore`, the command line of pipelines/restoration.py.

Image k, in the order of names, draws from `torch.Generator().manual_seed(seed + k)` alone, so it is the same (up to a
grey level of round-off) in whatever batch. A folder is read whole before anything is written, and one that was
interrupted goes on: its restoration.json says of which images, model and settings the finished ones are.
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
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..community_pipelines import pipeline_file
from ..data.decode import to_array
from ..errors import UserError
from ..files import write_beside, writing
from ..models.pretrained import Pretrained, errors_only
from ..pictures import frame, image_sheet, to_uint8
from .samplers import image_generators


SCHEMA = "ddpm_hf.restoration/1"
RECORD = "restoration.json"
ON_SHEET, COLUMNS = 16, 8  # images that are shown, and in a row
TASK_OF = {"mask": "inpaint", "scale_factor": "super_resolution", "blur_sigma": "deblur"}  # flags of one task alone
SETTINGS = ["task", "noise_level", "scale_factor", "blur_sigma", "num_inference_steps", "num_samples"]


@dataclass
class Item:
    """One image to restore: its number, its file, where the result goes, its mask's file (inpaint), its (H, W)."""

    index: int
    path: Path
    output: Path
    mask: Path | None
    size: tuple[int, int] = (0, 0)


def open_pipeline(model: Pretrained, name: str) -> DiffusionPipeline:
    """Return our community pipeline `name` around a loaded model, on the device of this process."""
    plain = DDPMPipeline(model.unet, model.scheduler.stock())
    names = {"id2label": dict(enumerate(model.class_names))} if model.class_names else {}
    # diffusers asks for this flag before it runs any file; this file was installed with the code that is running.
    options = dict(custom_pipeline=str(pipeline_file(name)), trust_remote_code=True)
    with errors_only():  # it warns of its own cast, from float32 to float32
        pipeline = DiffusionPipeline.from_pipe(plain, **options, **names)
    return pipeline.to(PartialState().device)


def pipeline_options(arguments) -> dict:
    """Return the flags that were given and that the pipeline takes, or refuse those of another task."""
    for name, task in TASK_OF.items():
        if getattr(arguments, name) is not None and arguments.task != task:
            raise UserError(f"--{name} belongs to --task {task}, and --task is {arguments.task}: leave it out.")
    if arguments.task == "inpaint" and arguments.mask is None:
        raise UserError("--task inpaint needs --mask: an image, or a folder of one per image, white where to paint.")
    if arguments.noise_level is not None and not arguments.noise_level >= 0:
        raise UserError(f"--noise_level is {arguments.noise_level}; it must be at least 0.")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size is {arguments.batch_size}; it must be at least 1.")
    return {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}


def find_items(arguments) -> list[Item]:
    """Return what is to be restored, by name: the images right inside a folder, or one file."""
    place, output = Path(arguments.input), Path(arguments.output)
    if place.is_file():
        if output.resolve() == place.resolve():
            raise UserError(f"OUTPUT {output} is INPUT itself: give another name.")
        if output.suffix != ".png" or output.is_dir():
            raise UserError(f"OUTPUT is {output}, but an image is written as PNG: give a name ending in .png.")
        return [Item(0, place, output, find_mask(place, arguments.mask))]
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
    masks = [find_mask(path, arguments.mask) for path in paths]
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
        with contextlib.suppress(Accepted), told(item):
            generators = image_generators(seed, [item.index])
            pipeline(image[None], **masks([mask]), **options, generator=generators, callback_on_step_end=accept)
    return digest.hexdigest()


def masks(of_images: list[torch.Tensor | None]) -> dict:
    return {} if of_images[0] is None else {"mask": torch.stack(of_images)}


@contextlib.contextmanager
def told(item: Item):
    """Tell what the pipeline refuses, which is a ValueError, with the name of the image."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{item.path.name} cannot be restored with these flags: {error}") from error


def begin(items: list[Item], arguments, record: dict) -> list[Item]:
    """Return the items without a result yet; begin the folder, or go on with it if its record is the same.

    Raises:
        UserError: if there is something else already, and no --overwrite; if nothing can be written there.
    """
    output, text = Path(arguments.output), json.dumps(record, indent=2) + "\n"
    if Path(arguments.input).is_file():
        if output.exists() and not arguments.overwrite:
            raise UserError(f"{output} is there already: give another OUTPUT, or --overwrite to replace it.")
        with writing("the image", output):
            output.parent.mkdir(parents=True, exist_ok=True)
        return items
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        if not (output / RECORD).is_file() or (output / RECORD).read_text() != text:
            raise UserError(
                f"{output} holds something else than results of this model, these images and these settings: give "
                "another OUTPUT, or --overwrite to replace files of the same names."
            )
        return [item for item in items if not item.output.exists()]
    with writing("the images", output):
        output.mkdir(parents=True, exist_ok=True)
        for item in items:  # an old file would pass for a result of what is about to begin
            item.output.unlink(missing_ok=True)
        write_beside(output / RECORD, lambda path: path.write_text(text))
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
            with told(batch[0]):
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
