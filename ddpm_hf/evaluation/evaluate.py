"""evaluate(): draw a model's images, or take samples, and score them against real ones. The order of work is here."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..errors import UserError, no_such
from ..files import writing
from ..models.pretrained import Pretrained, load_pretrained
from ..randomness import keyed_generator
from ..sampling.generate import sample_images
from ..sampling.sample_set import SampleSet, draw_samples, read_samples
from ..sampling.settings import Sampler, sampler_named
from .extractor import load_extractor
from .features import extract, images_at
from .inception import MissingWeights
from .metrics import FEWEST, METRICS, Look, has_floor, is_digits
from .records import by_reason, data_name, make_record, record_table, write_record
from .reference import read_reference, reference_of


# Images to draw and how (steps None: all T), images and timesteps of the bound (0: all).
SUITES = {
    "smoke": dict(num_images=256, sampler="ddim", steps=10, bound_images=64, bound_timesteps=10),
    "fast": dict(num_images=2_000, sampler="ddim", steps=50, bound_images=1_000, bound_timesteps=20),
    "standard": dict(num_images=10_000, sampler="ddim", steps=50, bound_images=10_000, bound_timesteps=20),
    "paper": dict(num_images=50_000, sampler="ddpm", steps=None, bound_images=0, bound_timesteps=0),
}
DATA_FLAGS = ["dataset_name", "dataset_config_name", "image_column", "label_column", "validation_split", "class_names"]
FEW_FOR_FID = 2048  # below the number of Inception's features FID is mostly its bias


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that an evaluation is made of; every process of a launch has the same.

    Attributes:
        metrics: names of METRICS, in the order of the record.
        train, held_out: ImageSets of real images; `held_out` may be None.
        data_name: what the record calls them.
        model: what is scored, and what bits_per_dim needs; None if only images are known.
        sampler: draws the images of `model`, resolved for it; None where `samples` are given.
        samples: images that are there already.
        num_images: how many images to draw.
        samples_dir: where images are drawn to; None: in memory.
        features: the extractor of metrics that leave the choice.
        options: of each extractor's loader, by its name.
        batch_size: images at a time, drawn or looked at.
        bound_images, bound_timesteps: of bits_per_dim; None for all of them.
        reference_file, reference_pipeline: statistics to take for FID instead of those of `train`.
        cache_dir: where features of real images are kept.
        pairs_path: where memorization draws the closest pairs; None: nowhere.
        on_step: called after every step of sampling in memory.
        extractors: by name, once opened: the module, or why it is not available.
        real: by name of the extractor, once computed: the References of `train` and `held_out`.
    """

    metrics: list[str]
    train: Any
    held_out: Any = None
    data_name: str = ""
    model: Pretrained | None = None
    sampler: Sampler | None = None
    samples: SampleSet | None = None
    num_images: int = 0
    samples_dir: Path | None = None
    features: str = "inception"
    options: dict = field(default_factory=dict)
    batch_size: int = 64
    bound_images: int | None = 1000
    bound_timesteps: int | None = 20
    reference_file: str | None = None
    reference_pipeline: str | None = None
    cache_dir: str | None = None
    pairs_path: Path | None = None
    on_step: Callable | None = None
    extractors: dict = field(default_factory=dict)
    real: dict = field(default_factory=dict)

    @property
    def sampler_record(self) -> dict:
        """How the images were drawn, as the record says it; {} where nobody knows."""
        return self.samples.sampler if self.samples is not None else self.sampler.record(self.model)

    @property
    def requested_classes(self) -> list[str] | None:
        """The names of the classes that were requested, in turn: image k is to be of class [k % len]."""
        record = self.sampler_record
        names = record.get("class_names")
        return None if names is None else [names[label] for label in record["class_labels"]]

    def extractor_of(self, metric: str) -> str | None:
        """Return the name of the extractor that a metric looks through, or None."""
        name = METRICS[metric].extractor
        return self.features if name == "chosen" else name

    def skipped(self, metric: str) -> str | None:
        """Return why a metric is skipped, once the extractors are open, or None."""
        extractor = self.extractors.get(self.extractor_of(metric))
        return extractor if isinstance(extractor, str) else None

    @property
    def needs_images(self) -> bool:
        """Whether any metric looks at generated images: bits_per_dim does not."""
        return any(name != "bits_per_dim" and not self.skipped(name) for name in self.metrics)


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` returns: the record, where it was written, and the metrics asked for. It prints as a table."""

    record: dict
    path: Path | None
    metrics: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """The value of each score by its id; skipped metrics are left out."""
        return {entry["id"]: entry["value"] for entry in self.record["metrics"] if "value" in entry}

    @property
    def skipped(self) -> dict[str, str]:
        """Why each skipped metric was skipped, by its name."""
        return {entry["id"]: entry["reason"] for entry in self.record["metrics"] if "reason" in entry}

    def __str__(self) -> str:
        return record_table(self.record)


# More than 60 lines because each of its keywords is a flag of the command and has a line of its own.
def evaluate(
    subject: str | Path | Pretrained | None = None,
    *,
    samples: str | Path | None = None,
    calibrate: bool = False,
    metrics: list[str] | None = None,
    suite: str = "fast",
    num_images: int | None = None,
    bound_images: int | None = None,
    bound_timesteps: int | None = None,
    features: str | None = None,
    weights: str = "published",
    batch_size: int = 64,
    sampler: str | Sampler | None = None,
    resolution: int = 32,
    inception: str | None = None,
    inception_pipeline: str = "tf1",
    dinov2: str = "facebook/dinov2-large",
    reference: str | None = None,
    reference_pipeline: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    samples_dir: str | Path | None = None,
    cache_dir: str | None = None,
    **flags,
) -> Evaluated | None:
    """Score a model, or samples, against real images, and write a record that says what each number is.

    Args:
        subject: a model (folder, checkpoint, Hub id, or what `load` returned), or samples: a folder of PNG files or an
            .npz of uint8 images (N, H, W, C).
        samples: samples of the model `subject`, to be scored instead of drawing new ones.
        calibrate: score held-out images against the training images; there is no model then.
        metrics: names of METRICS; None: those that suit the data.
        suite: how much is measured: smoke, fast, standard or paper, see SUITES. The next three override it.
        num_images: images to draw, or how many of the samples to take; at least 40.
        bound_images, bound_timesteps: of bits_per_dim: held-out images (at least 1), and timesteps of each (at least
            2); 0 means all.
        features: the extractor of kid and precision_recall: inception, dinov2 or digits; None: what suits the data.
        weights: published or raw, see `load`.
        batch_size: images at a time; changes a score by round-off at most.
        sampler: how images are drawn, a name or a `Sampler`; None: the suite's.
        resolution: of `calibrate`, in pixels.
        inception, inception_pipeline, dinov2: weights of the networks, and how images are resized for Inception.
        reference, reference_pipeline: a file of statistics (mu, sigma) for FID, and the pipeline it was made with.
        output: the record; None: a new name in `evaluations`, in the run's folder or here.
        overwrite: replace the record that is in `output`.
        samples_dir: where images are drawn to; None: `evaluation_samples`, in the run's folder or here.
        cache_dir: where features of real images are kept; None: ddpm_hf in HuggingFace's cache.
        flags: fields of the sampler (num_inference_steps, seed, ...), and which real images, as in training:
            dataset_name, dataset_config_name, image_column, label_column, validation_split, class_names. They win over
            those of the model's own train_config.json.

    Returns:
        The record, its path and its scores on the main process; None on the others.

    Raises:
        UserError: for inputs that do not go together, or that cannot be read; nothing is drawn or written then.

    Example:
        >>> result = ddpm_hf.evaluate("runs/digits", metrics=["bits_per_dim"], suite="smoke")
        >>> result.scores["bits_per_dim"] > 0
        True
    """
    started = time.perf_counter()
    check_metrics(metrics or [])
    data = {name: flags.pop(name) for name in DATA_FLAGS if name in flags}
    numbers = choose_suite(suite, num_images, bound_images, bound_timesteps, batch_size)
    given = subject or samples
    model, samples = open_subject(subject, samples, calibrate=calibrate, weights=weights, num_images=num_images)
    train, held_out = open_data(data, model, samples, calibrate=calibrate, resolution=resolution)
    if calibrate:
        rows = torch.randperm(len(held_out), generator=keyed_generator(0, "floor"))[: numbers["num_images"]]
        samples = SampleSet(images_at(held_out, rows), {"method": "real", "split": "held_out"}, {})
    if samples is not None:
        check_shapes(samples.images, train)
    resolved = None if samples is not None else choose_sampler(model, sampler, flags, numbers)
    short_name = name_of_sampler(model, samples.sampler if samples is not None else resolved.record(model))
    path = record_path(output, overwrite, model, f"{short_name}-{numbers['num_images']}", given=given)
    evaluation = Evaluation(
        metrics=metrics or [name for name, metric in METRICS.items() if metric.suits(train, model)],
        train=train,
        held_out=held_out,
        data_name=name_of_data(data, model),
        model=model,
        sampler=resolved,
        samples=samples,
        num_images=numbers["num_images"],
        samples_dir=Path(samples_dir or run_subfolder(model, "evaluation_samples") / short_name),
        features=features or ("digits" if is_digits(train) else "inception"),
        options={
            "inception": {"weights": inception, "pipeline": inception_pipeline},
            "dinov2": {"source": dinov2},
        },
        batch_size=batch_size,
        bound_images=numbers["bound_images"] or None,
        bound_timesteps=numbers["bound_timesteps"] or None,
        reference_file=reference,
        reference_pipeline=reference_pipeline,
        cache_dir=cache_dir,
        pairs_path=path.with_suffix(".pairs.png"),
    )
    open_extractors(evaluation)
    check_count(evaluation, numbers["num_images"] if samples is None else len(samples.images))
    for line in warnings_about(evaluation):
        PartialState().print(line, flush=True)
    record = run_evaluation(evaluation, started)
    if record is None:
        return None
    write_record(record, path)
    return Evaluated(record, path, evaluation.metrics)


def run_evaluation(evaluation: Evaluation, started: float | None = None) -> dict | None:
    """Draw what is needed, score it, and return the record on the main process, None on the others.

    Every process of a launch calls this, after `open_extractors`. Training calls it too, so its records compare with
    those of `evaluate`.

    Args:
        started: when the work began, by time.perf_counter(); None: now.

    Raises:
        UserError: for fewer images than an error can be estimated from.
    """
    started = time.perf_counter() if started is None else started
    images = evaluation.samples.images if evaluation.samples is not None else torch.empty(0, dtype=torch.uint8)
    if evaluation.samples is None and evaluation.needs_images:
        images = _draw(evaluation)
    drawn = time.perf_counter()
    entries = score(evaluation, images)
    if not PartialState().is_main_process:
        return None
    cost = {"drawing_s": round(drawn - started, 1), "scoring_s": round(time.perf_counter() - drawn, 1)}
    return make_record(evaluation, entries, images, cost)


def _draw(evaluation: Evaluation) -> torch.Tensor:
    """Return the images 0..num_images-1 of the model on every process; each draws its share."""
    model, sampler, count = evaluation.model, evaluation.sampler, evaluation.num_images
    if evaluation.samples_dir is not None:
        draw_samples(model, sampler, count, evaluation.samples_dir, batch_size=evaluation.batch_size)
        return read_samples(evaluation.samples_dir).images[:count]
    state = PartialState()
    share = range(state.process_index, count, state.num_processes)
    images = sample_images(
        model,
        sampler,
        share,
        batch_size=evaluation.batch_size,
        on_step=evaluation.on_step,
        progress=state.is_main_process,
    )
    drawn = sorted(gather_object(list(zip(share, images.numpy()))), key=lambda pair: pair[0])
    return torch.stack([torch.from_numpy(image) for _, image in drawn])


def score(evaluation: Evaluation, images: torch.Tensor) -> list[dict]:
    """Return the entries of all metrics on the main process; [] or parts of them on the others.

    Args:
        images: uint8 (N, C, H, W), the generated ones.

    Raises:
        UserError: for fewer images than an error can be estimated from.
    """
    check_count(evaluation, len(images))
    entries, generated = [], {}
    for name in evaluation.metrics:
        extractor_name = evaluation.extractor_of(name)
        if reason := evaluation.skipped(name):
            entries.append({"id": name, "status": "skipped", "reason": reason})
        elif extractor_name is None:
            entries += METRICS[name].function(Look(evaluation, images))
        else:
            extractor = evaluation.extractors[extractor_name]
            # All processes work on the features, and the main one on the score.
            train, held_out = _real_features(evaluation, extractor_name)
            if extractor_name not in generated:
                size = evaluation.batch_size
                generated[extractor_name] = extract(extractor, images, None, size, "generated images")
            if PartialState().is_main_process:
                look = Look(evaluation, images, extractor, generated[extractor_name], train, held_out)
                entries += METRICS[name].function(look)
    return list({entry["id"]: entry for entry in entries}.values())  # two metrics may share a number


def _real_features(evaluation: Evaluation, name: str):
    """Return the References of the training and of the held-out images (None without a floor), computed once."""
    if name not in evaluation.real:
        extractor, size, cache = evaluation.extractors[name], evaluation.batch_size, evaluation.cache_dir
        train = reference_of(extractor, evaluation.train, "training images", size, cache)
        held_out = None
        if has_floor(evaluation):
            held_out = reference_of(extractor, evaluation.held_out, "held-out images", size, cache)
        evaluation.real[name] = train, held_out
    return evaluation.real[name]


def check_metrics(names: list[str]):
    """Refuse, with a UserError, a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise UserError(no_such("metric", name, METRICS))


def check_count(evaluation: Evaluation, num_images: int):
    """Refuse, with a UserError, fewer images than a score of features can be estimated from."""
    if len(evaluation.train) < FEWEST:
        raise UserError(f"there are only {len(evaluation.train)} real images to compare with: give at least {FEWEST}.")
    for name in evaluation.metrics:
        looks = evaluation.extractor_of(name) is not None and not evaluation.skipped(name)
        if looks and num_images < FEWEST:
            raise UserError(f"{name} of {num_images} images says nothing: give at least {FEWEST}.")


def open_extractors(evaluation: Evaluation):
    """Load the networks that the metrics look through, and try each on two real images before the long work.

    Raises:
        UserError: for images that an extractor does not take, statistics of another pipeline, a model without bound.
    """
    check_metrics(evaluation.metrics)
    for name in evaluation.metrics:
        if name == "bits_per_dim" and evaluation.model is None:
            raise UserError("bits_per_dim is of a model, and only samples are given: give the model, or leave it out.")
        extractor = evaluation.extractor_of(name)
        if extractor is None or extractor in evaluation.extractors:
            continue
        try:
            module = load_extractor(extractor, **evaluation.options.get(extractor, {}))
            module(images_at(evaluation.train, range(2)).to(PartialState().device))
        except MissingWeights as error:
            module = str(error)
        evaluation.extractors[extractor] = module
    if "bits_per_dim" in evaluation.metrics:
        check_labels(evaluation)
    if evaluation.reference_file is not None:
        if "fid" not in evaluation.metrics:
            raise UserError("--reference is for fid: add it to --metrics, or leave the file out.")
        if not evaluation.skipped("fid"):
            extractor = evaluation.extractors["inception"]
            read_reference(evaluation.reference_file, extractor, evaluation.reference_pipeline)


def check_labels(evaluation: Evaluation):
    """Refuse, with a UserError, data that does not tell a conditional model which classes to condition on."""
    classes, train = evaluation.model.classes, evaluation.train
    labels = (evaluation.held_out or train).labels
    if not classes:
        return
    if labels is None or labels.min() < 0 or labels.max() >= classes.num_embeddings:
        last = classes.num_embeddings - 1
        raise UserError(f"bits_per_dim of this model needs a class from 0 to {last} for each real image.")
    if classes.names and list(classes.names) != train.class_names:
        raise UserError(
            f"bits_per_dim: the model's classes are {', '.join(classes.names)}, the data's "
            f"{', '.join(train.class_names)}: give data of the same classes, see --class_names."
        )


def choose_suite(suite: str, num_images, bound_images, bound_timesteps, batch_size: int) -> dict:
    """Return the numbers of images and timesteps of a suite, over which those given win; refuse impossible ones."""
    if suite not in SUITES:
        raise UserError(no_such("suite", suite, SUITES))
    given = {"num_images": num_images, "bound_images": bound_images, "bound_timesteps": bound_timesteps}
    numbers = SUITES[suite] | {name: value for name, value in given.items() if value is not None}
    if min(numbers["num_images"], batch_size) < 1:
        raise UserError("--num_images and --batch_size must be at least 1.")
    if numbers["bound_images"] < 0 or numbers["bound_timesteps"] < 0 or numbers["bound_timesteps"] == 1:
        raise UserError("--bound_images is at least 1, --bound_timesteps at least 2; 0 means all: give such numbers.")
    return numbers


def choose_sampler(model: Pretrained, sampler: str | Sampler | None, settings: dict, suite: dict) -> Sampler:
    """Return the sampler for a model, resolved: the suite's, unless another is named. Prints its warnings."""
    if not isinstance(sampler, Sampler):
        settings = dict(settings)
        listed = not isinstance(spacing := settings.get("timesteps", "trailing"), str) or spacing[:1].isdigit()
        unsaid = settings.get("num_inference_steps") is None and not listed
        if unsaid and sampler in (None, suite["sampler"]) and suite["steps"]:
            settings["num_inference_steps"] = min(suite["steps"], len(model.scheduler))
    resolved = sampler_named(sampler or suite["sampler"], settings).resolve(model)
    for warning in resolved.warnings(model):
        PartialState().print(warning, flush=True)
    return resolved


def open_subject(
    subject, samples, *, calibrate: bool, weights: str, num_images: int | None
) -> tuple[Pretrained | None, SampleSet | None]:
    """Return the model and the samples that are to be scored; one of them may be None, with `calibrate` both are.

    Raises:
        UserError: if there is nothing to score, or two things that do not belong together.
    """
    if calibrate:
        if subject or samples:
            raise UserError("--calibrate scores real images only: leave out the model and the samples.")
        return None, None
    if subject is None and samples is None:
        raise UserError("there is nothing to score: give a model, a folder or .npz of samples, or --calibrate.")
    model = subject if isinstance(subject, Pretrained) else None
    if subject is not None and model is None:
        path = Path(subject)
        if path.suffix == ".npz" or path.is_dir() and not _holds_a_model(path):
            if samples is not None:
                raise UserError(f"{subject} and --from_samples {samples} are both samples: give one, or a model.")
            samples = path
        else:
            model = load_pretrained(subject, weights)
    if samples is None:
        return model, None
    found = read_samples(samples)
    if num_images is not None:
        if num_images > len(found.images):
            raise UserError(
                f"there are {len(found.images)} samples, and --num_images asks for {num_images}: give fewer."
            )
        found.images = found.images[:num_images]
    if model is not None and found.model.get("unet_sha256") not in (None, model.facts["unet_sha256"]):
        raise UserError(f"{samples} was drawn by another model than {subject}: give that, or the samples alone.")
    return model, found


def _holds_a_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model_index.json", "state.pt", "classifier"))


def open_data(data: dict, model: Pretrained | None, samples: SampleSet | None, *, calibrate: bool, resolution: int):
    """Return the ImageSets (train, held out or None): those of the model's run, over which `data` wins.

    Raises:
        UserError: if nothing says which images, or they cannot be read.
    """
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    flags = model.run.get("flags", {}) if model is not None else {}
    flags = {key: value for key, value in flags.items() if key in known}
    if "dataset_name" in data and data["dataset_name"] != flags.get("dataset_name"):
        # A different --dataset_name is taken to be another copy of the same data.
        flags = {key: flags[key] for key in ("validation_split", "class_names", "center_crop") if key in flags}
    flags |= data
    if not flags.get("dataset_name") and not flags.get("train_data_dir"):
        raise UserError("nothing says which real images to compare with: give --dataset_name (Hub id or folder).")
    channels = None  # those of the data
    if model is not None:
        size, channels = model.unet.config.sample_size, model.unet.config.in_channels
        if not isinstance(size, int) and size[0] != size[1]:
            name = model.facts["name"]
            raise UserError(f"{name} has images of {size[0]}x{size[1]}: only square ones can be scored.")
        flags["resolution"] = size if isinstance(size, int) else size[0]
    elif samples is not None:
        flags["resolution"] = samples.images.shape[-1]
    else:
        flags.setdefault("resolution", resolution)
    flags |= {"streaming": False, "random_flip": False, "resume_from_checkpoint": None}
    with PartialState().local_main_process_first():
        train, held_out = load_images(TrainingConfig(**flags), channels)
    if calibrate and held_out is None:
        raise UserError("--calibrate compares held-out with training images: add --validation_split, e.g. test.")
    return train, held_out


def warnings_about(evaluation: Evaluation) -> list[str]:
    """Return sentences about what the numbers to come will not be good for."""
    reasons = by_reason({name: evaluation.skipped(name) for name in evaluation.metrics})
    lines = [f"Warning: {ids} will be skipped: {reason}" for ids, reason in reasons]
    if not has_floor(evaluation):
        lines.append(
            f"Warning: fewer than {FEWEST} images are held out, so there are no floors: see --validation_split."
        )
    count = evaluation.num_images if evaluation.samples is None else len(evaluation.samples.images)
    if "fid" in evaluation.metrics and not evaluation.skipped("fid") and count < FEW_FOR_FID:
        lines.append(f"Warning: FID of {count} images is mostly its bias: compare it with its floor, at equal N.")
    return lines


def check_shapes(images: torch.Tensor, train):
    """Refuse, with a UserError, samples that are not of the data's size."""
    wanted = (train.channels, train.resolution, train.resolution)
    if tuple(images.shape[1:]) != wanted:
        given, real = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        raise UserError(f"the samples are {given}, the real images {real}: give samples, or data, of one size.")


def record_path(output, overwrite: bool, model: Pretrained | None, stem: str, *, given) -> Path:
    """Return where the record goes: `output`, unless it is there already, or a new name in `evaluations`."""
    if output is not None:
        path = Path(output)
        for old in (path, path.with_suffix(".pairs.png")):
            if old.exists() and not overwrite:
                raise UserError(f"--output: {old} exists: add --overwrite to replace it, or give another name.")
        with writing("the record", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
    if model is None:
        stem = Path(given).stem if isinstance(given, (str, Path)) else "calibration"
    folder, count = run_subfolder(model, "evaluations"), 1
    while (path := folder / f"{stem}{f'-{count}' if count > 1 else ''}.json").exists():
        count += 1
    return path


def run_subfolder(model: Pretrained | None, name: str) -> Path:
    """Return folder `name` in the run that a local model is of, or here for others."""
    if model is None or model.facts["revision"] is not None:
        return Path(name)
    return model.run_folder / name


def name_of_sampler(model: Pretrained | None, sampler: dict) -> str:
    """Return a short name of a sampler's record, with 6 digits that tell its settings and the weights from others."""
    if model is None or not sampler:
        return "samples"
    all_of_it = json.dumps([sampler, model.facts["unet_sha256"]], sort_keys=True)
    digits = hashlib.sha256(all_of_it.encode()).hexdigest()[:6]
    return f"{sampler['method']}{sampler['num_inference_steps']}-{digits}"


def name_of_data(data: dict, model: Pretrained | None) -> str:
    """Return what a record calls the real images."""
    flags = {} if model is None else model.run.get("flags", {})
    return data_name(data.get("dataset_name") or flags.get("dataset_name") or flags.get("train_data_dir"))
