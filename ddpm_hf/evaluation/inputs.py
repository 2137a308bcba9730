"""Open what `evaluate` is given (a model, samples, real images), choose how much to measure, and name the files."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from accelerate import PartialState

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..data.image_set import ImageSet
from ..errors import UserError, no_such
from ..files import writing
from ..models.pretrained import Pretrained, load_pretrained
from ..sampling.sample_set import SampleSet, read_samples
from ..sampling.samplers import image_shape
from ..sampling.settings import Sampler, sampler_named
from .metrics import METRICS
from .records import data_name


# How many images a suite draws and how (steps None: all T), and how many images and timesteps its bound takes
# (0: all).
SUITES = {
    "smoke": dict(num_images=256, sampler="ddim", steps=10, bound_images=64, bound_timesteps=10),
    "fast": dict(num_images=2_000, sampler="ddim", steps=50, bound_images=1_000, bound_timesteps=20),
    "standard": dict(num_images=10_000, sampler="ddim", steps=50, bound_images=10_000, bound_timesteps=20),
    "paper": dict(num_images=50_000, sampler="ddpm", steps=None, bound_images=0, bound_timesteps=0),
}
DATA_FLAGS = ["dataset_name", "dataset_config_name", "image_column", "label_column", "validation_split", "class_names"]


def check_metrics(names: list[str]):
    """Refuse, with a UserError, a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise UserError(no_such("metric", name, METRICS))


def choose_suite(suite: str, num_images, bound_images, bound_timesteps, batch_size: int) -> dict:
    """Return the row of SUITES named `suite`, with the numbers that are not None in place of its own.

    Raises:
        UserError: for an unknown suite or an impossible number.
    """
    if suite not in SUITES:
        raise UserError(no_such("suite", suite, SUITES))
    given = {"num_images": num_images, "bound_images": bound_images, "bound_timesteps": bound_timesteps}
    numbers = SUITES[suite] | {name: value for name, value in given.items() if value is not None}
    if numbers["num_images"] < 1 or batch_size < 1:
        raise UserError(
            f"--num_images is {numbers['num_images']} and --batch_size {batch_size}: each must be at least 1."
        )
    images, timesteps = numbers["bound_images"], numbers["bound_timesteps"]
    if images < 0 or timesteps < 0 or timesteps == 1:
        raise UserError(
            f"--bound_images is {images} and --bound_timesteps {timesteps}: give at least 1 image and at least 2 "
            "timesteps, or 0 for all."
        )
    return numbers


def choose_sampler(model: Pretrained, sampler: str | Sampler | None, settings: dict, suite: dict) -> Sampler:
    """Return the resolved sampler for a model: `sampler` if it is given, else the suite's. Print its warnings.

    Args:
        settings: fields of the sampler. The suite sets the number of steps where they and `sampler` do not.
        suite: a row of SUITES.

    Raises:
        UserError: for a sampler or a setting that does not exist, or that the model cannot do.
    """
    timesteps = settings.get("timesteps", "trailing")
    is_spacing = isinstance(timesteps, str) and not timesteps[:1].isdigit()
    is_open = is_spacing and settings.get("num_inference_steps") is None
    if is_open and suite["steps"] and sampler in (None, suite["sampler"]):
        settings = settings | {"num_inference_steps": min(suite["steps"], len(model.scheduler))}
    resolved = sampler_named(sampler or suite["sampler"], settings).resolve(model)
    for warning in resolved.warnings(model):
        PartialState().print(warning, flush=True)
    return resolved


def open_subject(
    subject, samples, *, calibrate: bool, weights: str, num_images: int | None
) -> tuple[Pretrained | None, SampleSet | None]:
    """Return the model and the samples to score. One of them may be None; with `calibrate`, both are.

    Raises:
        UserError: if there is nothing to score, or if the model and the samples do not belong together.
    """
    if calibrate:
        if subject or samples:
            raise UserError("--calibrate scores real images only: leave out the model and the samples.")
        return None, None
    if subject is None and samples is None:
        raise UserError("there is nothing to score: give a model, a folder or .npz of samples, or --calibrate.")
    model = None
    if isinstance(subject, Pretrained):
        model = subject
    elif subject is not None and _holds_samples(Path(subject)):
        if samples is not None:
            raise UserError(f"{subject} and --from_samples {samples} are both samples: give one, or a model.")
        samples = subject
    elif subject is not None:
        model = load_pretrained(subject, weights)
    if samples is None:
        return model, None
    found = read_samples(samples)
    if num_images is not None:
        if num_images > len(found.images):
            raise UserError(f"there are {len(found.images)} samples, but --num_images is {num_images}: give fewer.")
        found.images = found.images[:num_images]
    if model is not None and found.model.get("unet_sha256") not in (None, model.facts["unet_sha256"]):
        raise UserError(f"{samples} was drawn by another model than {subject}: give that model, or the samples alone.")
    return model, found


def _holds_samples(path: Path) -> bool:
    if path.suffix == ".npz":
        return True
    return path.is_dir() and not any((path / name).exists() for name in ("model_index.json", "state.pt", "classifier"))


def open_data(
    data: dict, model: Pretrained | None, samples: SampleSet | None, *, calibrate: bool, resolution: int
) -> tuple[ImageSet, ImageSet | None, str]:
    """Return the training images, the held-out images (or None), and the name that a record gives to the data.

    Args:
        data: values of DATA_FLAGS. They override the flags that the model was trained with.
        resolution: in pixels, for neither a model nor samples.

    Raises:
        UserError: if no flag names the images, or they cannot be read.
    """
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    flags = model.run.get("flags", {}) if model is not None else {}
    flags = {key: value for key, value in flags.items() if key in known}
    if "dataset_name" in data and data["dataset_name"] != flags.get("dataset_name"):
        # A different --dataset_name is taken to be another copy of the same data.
        flags = {key: flags[key] for key in ("validation_split", "class_names", "center_crop") if key in flags}
    flags |= data
    source = flags.get("dataset_name") or flags.get("train_data_dir")
    if not source:
        raise UserError(
            "no real images are named to compare with: give --dataset_name, a Hub id or a folder of images."
        )
    channels = None  # as many as the data has
    if model is not None:
        channels, height, width = image_shape(model.unet)
        if height != width:
            name = model.facts["name"]
            raise UserError(
                f"{name} has images of {height}x{width}, but only square ones can be scored: give another model."
            )
        flags["resolution"] = height
    elif samples is not None:
        flags["resolution"] = samples.images.shape[-1]
    else:
        flags.setdefault("resolution", resolution)
    flags |= {"streaming": False, "random_flip": False, "resume_from_checkpoint": None}
    with PartialState().local_main_process_first():
        train, held_out = load_images(TrainingConfig(**flags), channels)
    if calibrate and held_out is None:
        raise UserError("--calibrate compares held-out with training images: add --validation_split, e.g. test.")
    return train, held_out, data_name(source)


def check_labels(model: Pretrained, train: ImageSet, held_out: ImageSet | None):
    """Refuse, with a UserError, real images whose labels are not classes of a conditional model."""
    if not model.classes:
        return
    labels = (held_out or train).labels
    last = model.classes.num_embeddings - 1
    if labels is None or labels.min() < 0 or labels.max() > last:
        raise UserError(
            f"bits_per_dim of this model needs a class from 0 to {last} for each real image, which the data does not "
            "have: give --label_column, or leave bits_per_dim out."
        )
    names = model.classes.names
    if names and list(names) != train.class_names:
        raise UserError(
            f"bits_per_dim: the model's classes are {', '.join(names)}, the data's {', '.join(train.class_names)}: "
            "give data of the same classes, see --class_names."
        )


def check_shapes(images: torch.Tensor, train: ImageSet):
    """Refuse, with a UserError, samples (N, C, H, W) of another size than the real images."""
    wanted = (train.channels, train.resolution, train.resolution)
    if tuple(images.shape[1:]) != wanted:
        given, real = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        raise UserError(f"the samples are {given}, the real images {real}: give samples and data of the same size.")


def record_path(output, overwrite: bool, folder: Path, stem: str) -> Path:
    """Return the path of the record: `output`, or a new name in `folder` that begins with `stem`.

    Raises:
        UserError: if `output` exists, unless it may be overwritten, or if its folder cannot be made.
    """
    if output is not None:
        path = Path(output)
        for old in (path, path.with_suffix(".pairs.png")):
            if old.exists() and not overwrite:
                raise UserError(f"--output: {old} exists: add --overwrite to replace it, or give another name.")
        with writing("the record", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
    count = 1
    while (path := folder / f"{stem}{f'-{count}' if count > 1 else ''}.json").exists():
        count += 1
    return path


def run_subfolder(model: Pretrained | None, name: str) -> Path:
    """Return subfolder `name` of a local model's run, or of the current folder for a Hub model and for None."""
    if model is None or model.facts["revision"] is not None:
        return Path(name)
    return model.run_folder / name


def name_of_sampler(model: Pretrained | None, sampler: dict) -> str:
    """Return a short name for a sampler's record, e.g. ddim50-1a2b3c.

    The last 6 digits are a hash of all its settings and of the weights. Images without a sampler are "samples".
    """
    if model is None or not sampler:
        return "samples"
    all_settings = json.dumps([sampler, model.facts["unet_sha256"]], sort_keys=True)
    digits = hashlib.sha256(all_settings.encode()).hexdigest()[:6]
    return f"{sampler['method']}{sampler['num_inference_steps']}-{digits}"
