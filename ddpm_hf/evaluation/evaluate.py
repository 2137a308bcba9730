"""From a model, or from samples, to a record: `python -m ddpm_hf evaluate`."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from accelerate import PartialState

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..errors import UserError
from ..files import writing
from ..models.pretrained import Pretrained, load_pretrained
from ..sampling.sample_set import SampleSet, read_samples
from ..sampling.settings import resolve_sampler, sampler_flags
from .metrics import FEWEST, has_floor, is_digits, skipped
from .records import by_reason


# Images to draw and how (steps None: all T), images and timesteps of the bound (0: all).
SUITES = {
    "smoke": dict(num_images=256, method="ddim", steps=10, bound_images=64, bound_timesteps=10),
    "fast": dict(num_images=2_000, method="ddim", steps=50, bound_images=1_000, bound_timesteps=20),
    "standard": dict(num_images=10_000, method="ddim", steps=50, bound_images=10_000, bound_timesteps=20),
    "paper": dict(num_images=50_000, method="ddpm", steps=None, bound_images=0, bound_timesteps=0),
}
FEW_FOR_FID = 2048  # below the number of Inception's features FID is mostly its bias
DATA_FLAGS = ["dataset_name", "dataset_config_name", "image_column", "label_column", "validation_split", "class_names"]


def asked_classes(sampler: dict) -> list[str] | None:
    """Return the names of the classes that a sampler asks for, in turn; None where there are none."""
    names = sampler.get("class_names")
    return None if names is None else [names[label] for label in sampler["class_labels"]]


def choose_suite(arguments) -> dict:
    """Return the numbers of images and timesteps of --suite, over which those of the command line win."""
    suite = dict(SUITES[arguments.suite or "fast"])
    for name in ("num_images", "bound_images", "bound_timesteps"):
        if getattr(arguments, name) is not None:
            suite[name] = getattr(arguments, name)
    if min(suite["num_images"], arguments.seed_ranges, arguments.batch_size) < 1:
        raise UserError("--num_images, --seed_ranges and --batch_size must be at least 1.")
    if suite["bound_images"] < 0 or suite["bound_timesteps"] < 0 or suite["bound_timesteps"] == 1:
        raise UserError("--bound_images is at least 1, --bound_timesteps at least 2; 0 means all: give such numbers.")
    return suite


def choose_sampler(arguments, model: Pretrained | None, suite: dict, guidance: dict) -> dict:
    """Return what decides how the images look: the suite's sampler, unless the command line names another."""
    if model is None:
        return {"method": "real", "split": "held_out"}
    flags = sampler_flags(arguments) | {"method": arguments.sampler or suite["method"]}
    listed = arguments.timesteps[:1].isdigit()
    if flags["num_inference_steps"] is None and flags["method"] == suite["method"] and suite["steps"] and not listed:
        flags["num_inference_steps"] = min(suite["steps"], len(model.scheduler))
    sampler, warnings = resolve_sampler(model, **flags, **guidance)
    for warning in warnings:
        PartialState().print(warning, flush=True)
    return sampler


def open_subject(arguments) -> tuple[Pretrained | None, SampleSet | None]:
    """Return the model and the samples that the command line names; one of them may be None, with --calibrate both."""
    subject, given = arguments.subject, arguments.from_samples
    if arguments.calibrate:
        if subject or given:
            raise UserError("--calibrate scores real images only: leave out the model and the samples.")
        return None, None
    if subject is None and given is None:
        raise UserError("there is nothing to score: give a model, a folder or .npz of samples, or --calibrate.")
    path = Path(subject or "")
    is_samples = subject is not None and (
        path.suffix == ".npz"
        or path.is_dir()
        and not any((path / name).exists() for name in ("model_index.json", "state.pt", "classifier"))
    )
    if is_samples and given is not None:
        raise UserError(f"{subject} and --from_samples {given} are both samples: give one of them, or a model.")
    model = None if subject is None or is_samples else load_pretrained(subject, arguments.weights)
    samples = read_samples(path if is_samples else given) if is_samples or given else None
    if samples is not None and arguments.num_images is not None:
        wanted = arguments.num_images * arguments.seed_ranges
        if wanted > len(samples.images):
            raise UserError(
                f"there are {len(samples.images)} samples, and --num_images asks for {wanted}: give fewer."
            )
        samples.images = samples.images[:wanted]
    if model is not None and samples is not None:
        drawn_by = samples.model.get("unet_sha256")
        if drawn_by not in (None, model.facts["unet_sha256"]):
            raise UserError(f"{given} was drawn by another model than {subject}: give that, or the samples alone.")
    return model, samples


def open_data(arguments, model: Pretrained | None, samples: SampleSet | None):
    """Return the ImageSets (train, held out or None): of the run's flags, over which the command line's win."""
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    flags = dict(model.run["flags"]) if model is not None and "flags" in model.run else {}
    flags = {key: value for key, value in flags.items() if key in known}
    given = {name: getattr(arguments, name) for name in DATA_FLAGS if getattr(arguments, name) is not None}
    if "dataset_name" in given and given["dataset_name"] != flags.get("dataset_name"):
        # Of another place the same set is meant, and its held-out images; of another set nothing is known.
        flags = {key: flags.get(key) for key in ("validation_split", "class_names", "center_crop") if key in flags}
    flags |= given
    if not flags.get("dataset_name") and not flags.get("train_data_dir"):
        raise UserError("nothing says which real images to compare with: give --dataset_name (Hub id or folder).")
    channels = None  # those of the data
    if model is not None:
        size, channels = model.unet.config.sample_size, model.unet.config.in_channels
        if not isinstance(size, int) and size[0] != size[1]:
            raise UserError(f"{arguments.subject} has images of {size[0]}x{size[1]}: only square ones can be scored.")
        flags["resolution"] = size if isinstance(size, int) else size[0]
    elif samples is not None:
        flags["resolution"] = samples.images.shape[-1]
    else:
        flags.setdefault("resolution", arguments.resolution or 32)
    flags |= {"streaming": False, "random_flip": False, "resume_from_checkpoint": None}
    with PartialState().local_main_process_first():
        train, held_out = load_images(TrainingConfig(**flags), channels)
    if arguments.calibrate and held_out is None:
        raise UserError("--calibrate compares held-out with training images: add --validation_split, e.g. test.")
    return train, held_out


def default_metrics(train, model) -> list[str]:
    """Return the metrics that suit the data: for grey digits the pinned classifier's, else Inception's."""
    looks = ["fd_mnist"] if is_digits(train) else ["fid", "kid", "precision_recall", "inception_score"]
    return looks + (["bits_per_dim"] if model is not None else []) + ["memorization"]


def warnings_about(names, evaluation, num_images: int) -> list[str]:
    """Return sentences about what the numbers to come will not be good for."""
    reasons = by_reason({name: skipped(name, evaluation) for name in names})
    lines = [f"Warning: {ids} will be skipped: {reason}" for ids, reason in reasons]
    if not has_floor(evaluation):
        lines.append(
            f"Warning: fewer than {FEWEST} images are held out, so there are no floors: see --validation_split."
        )
    if "fid" in names and not skipped("fid", evaluation) and num_images < FEW_FOR_FID:
        lines.append(f"Warning: FID of {num_images} images is mostly its bias: compare it with its floor, at equal N.")
    return lines


def check_shapes(images: torch.Tensor, train):
    """Refuse samples that are not of the data's size."""
    wanted = (train.channels, train.resolution, train.resolution)
    if tuple(images.shape[1:]) != wanted:
        given, real = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        raise UserError(f"the samples are {given}, the real images {real}: give samples, or data, of one size.")


def record_path(arguments, model, sampler: dict, num_images: int) -> Path:
    """Return where the record goes: --output, unless it is there already, or a new name in `evaluations`."""
    if arguments.output is not None:
        path = Path(arguments.output)
        for old in (path, path.with_suffix(".pairs.png")):
            if old.exists() and not arguments.overwrite:
                raise UserError(f"--output: {old} exists: add --overwrite to replace it, or give another name.")
        with writing("the record", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
    stem = f"{label(model, sampler)}-{num_images}"
    if model is None:
        given = arguments.subject or arguments.from_samples or "calibration"
        stem = Path(given).stem
    folder, count = home(model, "evaluations"), 1
    while (path := folder / f"{stem}{f'-{count}' if count > 1 else ''}.json").exists():
        count += 1
    return path


def home(model: Pretrained | None, name: str) -> Path:
    """Return folder `name` in the run that a local model is of, or here for others."""
    if model is None or model.facts["revision"] is not None:
        return Path(name)
    return (model.folder.parent if (model.folder / "state.pt").is_file() else model.folder) / name


def label(model: Pretrained | None, sampler: dict) -> str:
    """Return a short name of a sampler, with 6 digits of all that tells it and the weights apart."""
    if model is None or not sampler:
        return "samples"
    told = json.dumps([sampler, model.facts["unet_sha256"]], sort_keys=True)
    return f"{sampler['method']}{sampler['num_inference_steps']}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
