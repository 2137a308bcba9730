"""Open the inputs of `evaluate` (a model, samples, real images), choose how much to measure, and name the files."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from accelerate import PartialState

from ..config.training_config import DataOptions, TrainingConfig
from ..data.dataset import load_images
from ..data.image_set import ImageSet
from ..data.origins import naming_origin
from ..errors import UserError, no_such, whole_number
from ..files import check_output
from ..models.pretrained import Pretrained, load_pretrained
from ..sampling.sample_set import SampleSet, check_count, read_samples
from ..sampling.samplers import image_shape
from ..sampling.settings import Sampler, sampler_named
from .metrics import METRICS
from .records import data_name


# For each suite: the number of images to draw, the sampler and its number of steps (None: all T). For bits_per_dim:
# the number of images, and of timesteps per image (0: all).
SUITES = {
    "smoke": dict(num_images=256, sampler="ddim", steps=10, bound_images=64, bound_timesteps=10),
    "fast": dict(num_images=2_000, sampler="ddim", steps=50, bound_images=1_000, bound_timesteps=20),
    "standard": dict(num_images=10_000, sampler="ddim", steps=50, bound_images=10_000, bound_timesteps=20),
    "paper": dict(num_images=50_000, sampler="ddpm", steps=None, bound_images=0, bound_timesteps=0),
}
PIXEL_FLAGS = ["channels", "pixel_range", "on_bad_image", "pages"]
COLUMN_FLAGS = ["dataset_name", "dataset_config_name", "image_column", "label_column"]
DATA_FLAGS = [*COLUMN_FLAGS, "validation_split", "class_names", *PIXEL_FLAGS]
IDENTITY = ["unet_sha256", "schedule"]  # the facts of a model that determine its images
SAME_IN_A_COPY = ["validation_split", "class_names", "center_crop", *PIXEL_FLAGS]


def check_metrics(names: list[str]):
    """Raise a UserError if `names` is a string instead of a list, or if a name is not in METRICS."""
    if isinstance(names, str):
        raise UserError(f"metrics={names!r} is a string: give a list of names, such as {names.split(',')}")
    for name in names:
        if name not in METRICS:
            raise UserError(no_such("metric", name, METRICS))


def choose_suite(suite: str, num_images, bound_images, bound_timesteps) -> dict:
    """Return the row of SUITES named `suite`. Numbers that are given, i.e. not None, replace the numbers of the suite.

    Raises:
        UserError: for an unknown suite or an impossible number.
    """
    if suite not in SUITES:
        raise UserError(no_such("suite", suite, SUITES))
    given = {"num_images": num_images, "bound_images": bound_images, "bound_timesteps": bound_timesteps}
    given = {name: whole_number(f"--{name}", value) for name, value in given.items() if value is not None}
    numbers = SUITES[suite] | given
    check_count(numbers["num_images"])
    images, timesteps = numbers["bound_images"], numbers["bound_timesteps"]
    if images < 0 or timesteps < 0 or timesteps == 1:
        raise UserError(
            f"--bound_images is {images} and --bound_timesteps {timesteps}: give at least 1 image and at least 2 "
            "timesteps, or 0 for all."
        )
    return numbers


def choose_sampler(model: Pretrained, sampler: str | Sampler | None, settings: dict, suite: dict) -> Sampler:
    """Return the resolved sampler for a model: `sampler` if it is given, else the sampler of the suite.

    The warnings of the sampler are printed.

    Args:
        settings: fields of the sampler. If they set no steps, the suite's own sampler takes the steps of the suite.
        suite: a row of SUITES.

    Raises:
        UserError: for a sampler or a setting that does not exist, or that the model does not support.
    """
    timesteps = settings.get("timesteps", "trailing")
    is_spacing = isinstance(timesteps, str) and not timesteps[:1].isdigit()
    is_open = is_spacing and settings.get("num_inference_steps") is None
    if is_open and suite["steps"] and sampler in (None, suite["sampler"]):
        settings = settings | {"num_inference_steps": min(suite["steps"], len(model.scheduler))}
    resolved = sampler_named(sampler or suite["sampler"], settings).resolve(model)
    if resolved.size is not None:
        raise UserError(
            f"size is {resolved.size[0]}x{resolved.size[1]}, but a model is scored at the size it was trained on: "
            "leave size out."
        )
    for warning in resolved.warnings(model):
        PartialState().print(warning, flush=True)
    return resolved


def check_without_sampler(sampler, settings: dict):
    """Raise a UserError if a sampler or its settings are given, because the images were drawn earlier.

    Default values are accepted, because the command passes them too.
    """
    sampler_named(sampler or "ddpm", settings)  # refuses settings that do not exist
    changed = [name for name, value in settings.items() if value != getattr(Sampler, name, None)]
    if given := changed + ["sampler"] * (sampler is not None):
        raise UserError(
            f"--{min(given)} applies only to images that are drawn now, but samples are given: leave it out."
        )


def open_subject(
    subject, samples, *, calibrate: bool, weights: str, num_images: int | None
) -> tuple[Pretrained | None, SampleSet | None]:
    """Return the model and the samples to score. What is not given is None. With `calibrate`, both are None.

    Raises:
        UserError: if there is nothing to score, or if the model and the samples do not belong together.
    """
    if calibrate:
        if subject or samples:
            raise UserError(
                "--calibrate scores only real images, but a model or samples are given: leave the model and the "
                "samples out."
            )
        return None, None
    if subject is None and samples is None:
        raise UserError("there is nothing to score: give a model, a folder or .npz of samples, or --calibrate.")
    model = None
    if isinstance(subject, Pretrained):
        model = subject
    elif subject is not None and _holds_samples(Path(subject)):
        if samples is not None:
            raise UserError(
                f"{subject} and --from_samples {samples} are both samples: give only one of them, or a model and "
                "--from_samples."
            )
        samples = subject
    elif subject is not None:
        model = load_pretrained(subject, weights)
    if samples is None:
        return model, None
    found = read_samples(samples)
    if num_images is not None:
        if num_images > len(found.images):
            raise UserError(
                f"there are only {len(found.images)} samples, but --num_images is {num_images}: give a smaller "
                "--num_images."
            )
        found.images = found.images[:num_images]
    if model is not None and any(found.model.get(key) not in (None, model.facts[key]) for key in IDENTITY):
        raise UserError(
            f"{samples} was drawn from another model than {subject}: give the model of these samples, or the samples "
            "alone."
        )
    return model, found


def _holds_samples(path: Path) -> bool:
    if path.suffix == ".npz":
        return True
    return path.is_dir() and not any((path / name).exists() for name in ("model_index.json", "state.pt", "classifier"))


def open_data(
    data: dict, model: Pretrained | None, samples: SampleSet | None, *, calibrate: bool, resolution: int | str
) -> tuple[ImageSet, ImageSet | None, str]:
    """Return the training images, the held-out images (or None), and the name that a record gives to the data.

    Args:
        data: values of DATA_FLAGS. They override the flags that the model was trained with.
        resolution: see `read_size`. It is used if there is neither a model nor samples.

    Raises:
        UserError: if no flag names the images, or if the images cannot be read.
    """
    # Take only the flags that describe the images. A downloaded model must not decide where files are written.
    known = {field.name for field in dataclasses.fields(DataOptions)} - {"cache_dir", "dataloader_num_workers"}
    flags = model.run.get("flags", {}) if model is not None else {}
    flags = {key: value for key, value in flags.items() if key in known}
    if "dataset_name" in data and data["dataset_name"] != flags.get("dataset_name"):
        # A different --dataset_name is taken to be another copy of the same data.
        flags = {key: flags[key] for key in SAME_IN_A_COPY if key in flags}
    inherited = {key: value for key, value in flags.items() if key not in data}
    flags |= data
    source = flags.get("dataset_name") or flags.get("train_data_dir")
    if not source:
        raise UserError(
            "neither the flags nor the model say which real images to compare with: give --dataset_name, a Hub id or "
            "a folder of images."
        )
    channels = None  # as many as the data has
    if model is not None:
        channels, *size = image_shape(model.unet)
        flags["resolution"] = size
    elif samples is not None:
        flags["resolution"] = samples.images.shape[2:]
    else:
        flags.setdefault("resolution", resolution)
    flags |= {"streaming": False, "random_flip": False, "resume_from_checkpoint": None}
    with PartialState().local_main_process_first(), naming_origin(inherited, "the model's train_config.json"):
        train, held_out = load_images(TrainingConfig(**flags), channels)
    for warning in train.warnings:
        PartialState().print(warning, flush=True)
    if calibrate and held_out is None:
        raise UserError(
            "--calibrate compares held-out images with training images, but no images are held out: add "
            "--validation_split, e.g. test."
        )
    return train, held_out, data_name(source)


def check_labels(model: Pretrained, train: ImageSet, held_out: ImageSet | None):
    """Raise a UserError if the model is conditional and the real images do not have labels of its classes."""
    if not model.classes:
        return
    labels = (held_out or train).labels
    last = model.classes.num_embeddings - 1
    if labels is None or labels.min() < 0 or labels.max() > last:
        raise UserError(
            f"bits_per_dim of this model needs a label from 0 to {last} for each real image, but some images have no "
            "such label: give --label_column, or leave bits_per_dim out."
        )
    names = model.classes.names
    if names and list(names) != train.class_names:
        raise UserError(
            f"bits_per_dim needs data with the classes of the model ({', '.join(names)}), but this data has the "
            f"classes {', '.join(train.class_names)}: give data with the same classes, see --class_names."
        )


def match_channels(images: torch.Tensor, train: ImageSet) -> torch.Tensor:
    """Return samples (N, C, H, W). If the samples and the real images are grey, return only one channel.

    Many programs save grey images with three equal channels.
    """
    is_color = any(bool((part != part[:, :1]).any()) for part in images.split(1000))
    return images if is_color or train.channels != 1 else images[:, :1].contiguous()


def check_shapes(images: torch.Tensor, train: ImageSet):
    """Raise a UserError if the samples (N, C, H, W) do not have the size and the channels of the real images."""
    wanted = (train.channels, *train.size)
    if tuple(images.shape[1:]) != wanted:
        given, real = map(describe_shape, (images.shape[1:], wanted))
        raise UserError(
            f"the samples are {given}, but the real images are {real}: give samples and data of one shape."
        )


def describe_shape(shape: tuple[int, int, int]) -> str:
    """Return the shape (C, H, W) of images in words, e.g. "grey, 28x28"."""
    channels, height, width = shape
    return f"{ {1: 'grey', 3: 'in color'}.get(channels, f'of {channels} channels') }, {height}x{width}"


def record_path(output, overwrite: bool, folder: Path, stem: str) -> Path:
    """Return the path for the record: `output`. If it is None: {stem}.json in `folder`.

    If {stem}.json exists, `write_new_record` takes another name.

    Raises:
        UserError: if `output` exists and `overwrite` is False, or if `output` cannot be written.
    """
    if output is None:
        return folder / f"{stem}.json"
    path = check_output("--output", output)
    for old in (path, path.with_suffix(".pairs.png")):
        if old.exists() and not overwrite:
            raise UserError(f"{old} exists already: add --overwrite to replace it, or give another --output.")
    return path


def run_subfolder(model: Pretrained | None, name: str) -> Path:
    """Return the folder `name` in the run folder. For a Hub model or no model: in the current folder."""
    if model is None or model.facts["revision"] is not None:
        return Path(name)
    return model.run_folder / name


def name_of_sampler(model: Pretrained | None, sampler: dict) -> str:
    """Return a short name for a sampler's record, e.g. ddim50-1a2b3c.

    The last 6 digits are a hash of the record, the weights and the noise schedule. The name is "samples" if there is
    no model or if the record is empty.
    """
    if model is None or not sampler:
        return "samples"
    all_settings = json.dumps([sampler, *(model.facts[key] for key in IDENTITY)], sort_keys=True)
    digits = hashlib.sha256(all_settings.encode()).hexdigest()[:6]
    return f"{sampler['method']}{sampler['num_inference_steps']}-{digits}"
