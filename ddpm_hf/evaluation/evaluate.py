"""evaluate(): draw images from a model, or read samples, and score them against real images.

This file puts the steps of an evaluation in order. `inputs.py` opens its inputs, and `metrics.py` computes the scores.
"""

import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..errors import UserError, reason_of
from ..files import check_output
from ..models.pretrained import Pretrained
from ..randomness import keyed_generator
from ..sampling.batches import batch_size_of
from ..sampling.generate import sample_together
from ..sampling.sample_set import SampleSet, draw_samples, read_samples
from ..sampling.samplers import code_of
from ..sampling.settings import Sampler
from . import inputs
from .bound import bound_evaluations
from .extractor import load_extractor
from .features import extract, images_at
from .inception import MissingWeights
from .metric_input import FEWEST, Look, has_floor
from .metrics import METRICS, default_features
from .records import by_reason, is_entry, make_record, record_table, scores_of, write_new_record
from .reference import Reference, read_reference, reference_of


FEW_FOR_FID = 2048  # Inception has 2048 features. With fewer images, most of an FID is its bias.


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that an evaluation needs. It is the same on every process of a launch.

    Attributes:
        metrics: names of METRICS, in the order of the record.
        train, held_out: ImageSets of real images. `held_out` may be None.
        data_name: the name of the data in the record.
        model: the model to score. bits_per_dim needs it. None if only samples are scored.
        sampler: draws images from `model`. `Sampler.resolve` must have returned it. None if `samples` are given.
        samples: images that were drawn earlier. None: draw new images.
        num_images: how many images to draw, or the number of `samples`.
        samples_dir: the folder to draw images into. None: keep the images in memory.
        features: the extractor for metrics that can use any extractor, such as kid.
        options: a dict from the name of each extractor to the keyword arguments of its loader.
        batch_size: how many images are drawn, or given to an extractor, at a time.
        bound_images, bound_timesteps: how many held-out images bits_per_dim uses, and how many timesteps of each
            image. None: all of them.
        reference_file: a file of statistics that FID uses in place of those of `train`.
        reference_pipeline: how the images of `reference_file` were resized, if the file does not say it.
        cache_dir: the folder that keeps features of real images.
        pairs_path: where memorization writes its picture of the closest pairs. None: no picture.
        on_step: a function to call after every sampling step. It is not called if `samples_dir` is given.
        extractors: a dict from the name of each extractor to the extractor, or to a sentence that says why it is
            unavailable. `open_extractors` fills it.
        real: a dict from the name of each extractor to the References of `train` and `held_out`. `score` fills it.
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
        """The settings that the images were drawn with, as in a record. {} if they are not known."""
        return self.samples.sampler if self.samples is not None else self.sampler.record(self.model)

    @property
    def requested_classes(self) -> list[str] | None:
        """The name of each requested class, in the order of the request. None if the classes have no names.

        Image k was requested as the class with the index `k % len(requested_classes)`.
        """
        record = self.sampler_record
        names = record.get("class_names")
        return None if names is None else [names[label] for label in record["class_labels"]]

    def extractor_of(self, metric: str) -> str | None:
        """Return the name of the extractor that a metric uses, or None if it uses none."""
        name = METRICS[metric].extractor
        return self.features if name == "chosen" else name

    def why_skipped(self, metric: str) -> str | None:
        """Return why a metric is skipped, or None if it is computed. Call `open_extractors` first."""
        extractor = self.extractors.get(self.extractor_of(metric))
        return extractor if isinstance(extractor, str) else None


@dataclass(frozen=True, repr=False)
class Evaluated:
    """The result of `evaluate`. `print` shows it as a table.

    Attributes:
        record: every number, and how it was measured: the content of the JSON file.
        path: the path of that file, which `compare` takes.
        metrics: the names of the metrics that were requested.
    """

    record: dict
    path: Path
    metrics: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """A dict from the id of each score to its value, without skipped metrics."""
        return scores_of(self.record)

    @property
    def skipped(self) -> dict[str, str]:
        """A dict from the name of each skipped metric to the reason."""
        return {entry["id"]: entry["reason"] for entry in self.record["metrics"] if "reason" in entry}

    @property
    def failed(self) -> list[str]:
        """The names of the metrics that raised an error. They are in `skipped` too."""
        return [entry["id"] for entry in self.record["metrics"] if entry.get("failed")]

    def __str__(self) -> str:
        return record_table(self.record)

    __repr__ = __str__  # a notebook shows the table


# Longer than 60 lines, because each keyword is a flag of the command and stands on a separate line.
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
    batch_size: int | str = 64,
    sampler: str | Sampler | None = None,
    resolution: int | str = 32,
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
    """Score a model, or samples, against real images, and write a record that says how each number was measured.

    Args:
        subject: a model (folder, checkpoint, Hub id, or the result of `load`), or samples: a folder of PNG files or an
            .npz of uint8 images (N, H, W, C).
        samples: images that the model `subject` drew earlier. They are scored, and no new images are drawn.
        calibrate: score held-out images against the training images, without a model.
        metrics: names of METRICS. None: the metrics that suit the data. For `samples`, these do not include
            bits_per_dim, because it is a score of the model.
        suite: how much to measure: smoke, fast, standard or paper, see SUITES. `num_images`, `bound_images` and
            `bound_timesteps` override the numbers of the suite.
        num_images: how many images to draw, or how many of the samples to use. Metrics that compare features need at
            least 40.
        bound_images, bound_timesteps: how many held-out images bits_per_dim uses, and how many timesteps of each
            image (2 or more). 0: all of them.
        features: the extractor of kid and precision_recall: inception, dinov2, digits or cifar10. None: digits for
            MNIST, else inception.
        weights: published or raw, see `load`.
        batch_size: how many images are drawn, or given to a network, together. "auto": up to 512 on a GPU, 64
            elsewhere. If memory runs out, batches are halved. The batch size changes scores only by rounding.
        sampler: the name of a sampler, or a `Sampler`. None: the sampler of the suite.
        resolution: the size of the images that `calibrate` compares, in pixels: 64, or "48x64" (height x width).
        inception: a file with the weights of Inception. None: the weights that pytorch-fid released.
        inception_pipeline: how images are resized for Inception: tf1, antialias or pytorch.
        dinov2: a folder or a Hub id with the weights of DINOv2.
        reference: a file of statistics (mu, sigma) for FID, in place of those of the training images.
        reference_pipeline: how the images of `reference` were resized, if the file does not say it: pytorch for a file
            of pytorch-fid, tf1 for a file of EDM or TTUR.
        output: the path of the record. None: a new file in the folder `evaluations` of the run. For a model from the
            Hub, and for samples without a model, this folder is in the current folder.
        overwrite: replace the record at `output`.
        samples_dir: the folder to draw images into. None: a subfolder of `evaluation_samples`, which is next to
            `evaluations`.
        cache_dir: the folder that keeps features of real images. None: the folder in the environment variable
            DDPM_HF_CACHE. If this is not set: ddpm_hf in HuggingFace's cache.
        flags: fields of the sampler, e.g. num_inference_steps or seed. Also flags that choose the real images, in
            place of those in the model's train_config.json: dataset_name, dataset_config_name, image_column,
            label_column, validation_split, class_names, channels, pixel_range, on_bad_image, pages.

    Returns:
        The result on the main process, with the record, its path and the scores. None on other processes.

    Raises:
        UserError: for inputs that cannot be read or do not fit together. In this case nothing was drawn or written.

    Example:
        >>> result = ddpm_hf.evaluate("runs/digits", metrics=["bits_per_dim"], suite="smoke")
        Data: 1,797 images; classes: 0 178, ...
        >>> result.scores["bits_per_dim"] > 0
        True
    """
    started = time.perf_counter()
    inputs.check_metrics(metrics or [])
    data = {name: flags.pop(name) for name in inputs.DATA_FLAGS if name in flags}
    numbers = inputs.choose_suite(suite, num_images, bound_images, bound_timesteps)
    batch_size = batch_size_of(batch_size, numbers["num_images"])
    model, found = inputs.open_subject(subject, samples, calibrate=calibrate, weights=weights, num_images=num_images)
    train, held_out, dataset = inputs.open_data(data, model, found, calibrate=calibrate, resolution=resolution)
    if calibrate:
        rows = torch.randperm(len(held_out), generator=keyed_generator(0, "floor"))[: numbers["num_images"]]
        found = SampleSet(images_at(held_out, rows), {"method": "real", "split": "held_out"}, {})
    if found is not None:
        inputs.check_without_sampler(sampler, flags)
        found.images = inputs.match_channels(found.images, train)
        inputs.check_shapes(found.images, train)
    resolved = None if found is not None else inputs.choose_sampler(model, sampler, flags, numbers)
    short_name = inputs.name_of_sampler(model, found.sampler if found is not None else resolved.record(model))
    stem = f"{short_name}-{numbers['num_images']}"
    if model is None:
        stem = Path(subject or samples or "calibration").stem
    path = inputs.record_path(output, overwrite, inputs.run_subfolder(model, "evaluations"), stem)
    images_dir = inputs.run_subfolder(model, "evaluation_samples") / short_name
    if samples_dir is not None:
        images_dir = check_output("--samples_dir", samples_dir)
    drawn_from = None if found is not None else model  # by default, given samples are scored without the model
    evaluation = Evaluation(
        metrics=metrics or [name for name, metric in METRICS.items() if metric.suits(train, drawn_from)],
        train=train,
        held_out=held_out,
        data_name=dataset,
        model=model,
        sampler=resolved,
        samples=found,
        num_images=numbers["num_images"] if found is None else len(found.images),
        samples_dir=images_dir,
        features=features or default_features(train),
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
        pairs_path=path.with_name(f".{path.stem}.{secrets.token_hex(4)}.pairs.png"),  # gets the record's name later
    )
    open_extractors(evaluation)
    for line in warnings_about(evaluation):
        PartialState().print(line, flush=True)
    try:
        record = run_evaluation(evaluation, started)
        if record is None:
            return None
        path = write_new_record(record, path, evaluation.pairs_path, overwrite=overwrite and output is not None)
        return Evaluated(record, path, evaluation.metrics)
    finally:
        evaluation.pairs_path.unlink(missing_ok=True)


def run_evaluation(evaluation: Evaluation, started: float | None = None) -> dict | None:
    """Draw the images, score them, and return the record on the main process. Return None on other processes.

    Every process of a launch must call this function, after `open_extractors`. Training calls it too, so that records
    of training can be compared with records of `evaluate`.

    Args:
        started: the value of time.perf_counter() when the work began. None: now.
    """
    started = time.perf_counter() if started is None else started
    images = torch.empty(0, dtype=torch.uint8)
    if evaluation.samples is not None:
        images = evaluation.samples.images
    elif any(name != "bits_per_dim" and not evaluation.why_skipped(name) for name in evaluation.metrics):
        if "bits_per_dim" in evaluation.metrics:
            images_as_long = bound_evaluations(evaluation) // evaluation.sampler.num_inference_steps
            how = "" if evaluation.sampler.guidance_scale == 1 else " without guidance"
            said = f"Scoring: bits_per_dim takes as long as drawing about {images_as_long:,} images{how}"
            PartialState().print(f"{said}; --bound_images changes that.", flush=True)
        images = _draw(evaluation)  # bits_per_dim alone needs no generated images
    drawn = time.perf_counter()
    entries = score(evaluation, images)
    if not PartialState().is_main_process:
        return None
    cost = {"drawing_s": round(drawn - started, 1), "scoring_s": round(time.perf_counter() - drawn, 1)}
    return make_record(evaluation, entries, images, cost)


def _draw(evaluation: Evaluation) -> torch.Tensor:
    """Draw images 0..num_images-1 of the model, and return them on every process, uint8 (N, C, H, W).

    Each process draws a share of the images.
    """
    what = evaluation.model, evaluation.sampler, evaluation.num_images
    if evaluation.samples_dir is None:
        return sample_together(*what, batch_size=evaluation.batch_size, on_step=evaluation.on_step)
    draw_samples(*what, evaluation.samples_dir, batch_size=evaluation.batch_size)
    return read_samples(evaluation.samples_dir).images[: evaluation.num_images]


def score(evaluation: Evaluation, images: torch.Tensor) -> list[dict]:
    """Return the entries of all metrics for the record. They are complete only on the main process.

    Args:
        images: the generated images, uint8 (N, C, H, W).
    """
    entries = []
    generated = {}
    for name in evaluation.metrics:
        extractor_name = evaluation.extractor_of(name)
        if reason := evaluation.why_skipped(name):
            entries.append({"id": name, "status": "skipped", "reason": reason})
        elif extractor_name is None:
            entries += entries_of(name, Look(evaluation, images))
        else:
            extractor = evaluation.extractors[extractor_name]
            # All processes extract features, and the main process computes the score from them.
            train, held_out = _real_features(evaluation, extractor_name)
            if extractor_name not in generated:
                generated[extractor_name] = extract(extractor, images, evaluation.batch_size, "generated images")
            if PartialState().is_main_process:
                look = Look(evaluation, images, extractor, generated[extractor_name], train, held_out)
                entries += entries_of(name, look)
    return list({entry["id"]: entry for entry in entries}.values())  # keep one entry per id: metrics can share scores


def entries_of(name: str, look: Look) -> list[dict]:
    """Return the entries of a metric. If the metric fails, return an entry that says why.

    So the other metrics are still computed, and a training goes on.
    """
    try:
        entries = METRICS[name].function(look)
        if not isinstance(entries, list) or not all(map(is_entry, entries)):
            raise UserError("a metric must return a list of `look.entry(...)`, whose numbers are ints, floats or None")
        code = code_of(METRICS[name].function)
        return [entry if code is None else entry | {"code": code} for entry in entries]
    except Exception as error:  # a user's own metric may raise anything
        if PartialState().is_main_process and not isinstance(error, UserError):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {reason_of(error)}"
        return [{"id": name, "status": "skipped", "failed": True, "reason": reason}]


def _real_features(evaluation: Evaluation, name: str) -> tuple[Reference, Reference | None]:
    """Return the References of the training images and of the held-out images. Compute them once per extractor.

    The Reference of the held-out images is None if fewer than FEWEST images are held out.
    """
    if name not in evaluation.real:
        extractor = evaluation.extractors[name]
        options = {"batch_size": evaluation.batch_size, "cache_dir": evaluation.cache_dir}
        train = reference_of(extractor, evaluation.train, "training images", **options)
        held_out = None
        if has_floor(evaluation):
            held_out = reference_of(extractor, evaluation.held_out, "held-out images", **options)
        evaluation.real[name] = train, held_out
    return evaluation.real[name]


def open_extractors(evaluation: Evaluation):
    """Load the networks that the metrics use. Try each network on two real images, before the long work begins.

    Raises:
        UserError: if there are too few images, if an extractor does not accept the images, if the reference statistics
            do not suit the extractor, if bits_per_dim has no model, or if the images lack labels that the model needs.
    """
    inputs.check_metrics(evaluation.metrics)
    for name in evaluation.metrics:
        if name == "bits_per_dim" and evaluation.model is None:
            raise UserError(
                "bits_per_dim needs a model, but only samples are given: give the model, or leave bits_per_dim out."
            )
        extractor = evaluation.extractor_of(name)
        if extractor is not None and (channels := evaluation.train.channels) not in (1, 3):
            raise UserError(
                f"{name} needs a network that sees grey or RGB images, but these images have {channels} channels: "
                "leave it out; bits_per_dim and memorization take any number of channels."
            )
        if extractor is None or extractor in evaluation.extractors:
            continue
        try:
            module = load_extractor(extractor, **evaluation.options.get(extractor, {}))
            module(images_at(evaluation.train, range(2)).to(PartialState().device))
        except MissingWeights as error:
            module = str(error)
        evaluation.extractors[extractor] = module
    if "bits_per_dim" in evaluation.metrics:
        inputs.check_labels(evaluation.model, evaluation.train, evaluation.held_out)
    if evaluation.reference_file is not None:
        if "fid" not in evaluation.metrics:
            raise UserError("--reference is only for fid, but fid is not computed: add fid, or leave --reference out.")
        if not evaluation.why_skipped("fid"):
            extractor = evaluation.extractors["inception"]
            read_reference(evaluation.reference_file, extractor, evaluation.reference_pipeline)
    check_count(evaluation)


def check_count(evaluation: Evaluation):
    """Raise a UserError if there are too few real or generated images for the metrics.

    FEWEST real images are always needed. FEWEST generated images are needed if a metric uses an extractor.
    """
    if len(evaluation.train) < FEWEST:
        raise UserError(
            f"there are only {len(evaluation.train)} real images to compare with: give data with at least {FEWEST}."
        )
    for name in evaluation.metrics:
        needs_features = evaluation.extractor_of(name) is not None and not evaluation.why_skipped(name)
        if needs_features and evaluation.num_images < FEWEST:
            raise UserError(
                f"{name} cannot be estimated from {evaluation.num_images} generated images: give at least {FEWEST}."
            )


def warnings_about(evaluation: Evaluation) -> list[str]:
    """Return the lines to print before the work: warnings and, without a model, the size to score images at."""
    reasons = by_reason({name: evaluation.why_skipped(name) for name in evaluation.metrics})
    lines = [f"Warning: {ids} will be skipped: {reason}" for ids, reason in reasons]
    if evaluation.model is None:
        height, width = evaluation.train.size
        lines.append(f"Scoring at {height}x{width}: real images of other sizes are resized.")
    if not has_floor(evaluation):
        held_out = "no images" if evaluation.held_out is None else f"fewer than {FEWEST} images"
        lines.append(
            f"Warning: {held_out} are held out, so no floors (values of real images) are computed: hold out more with "
            "--validation_split, e.g. test."
        )
    count = evaluation.num_images
    if has_floor(evaluation) and len(evaluation.held_out) < count:
        lines.append(
            f"Warning: only {len(evaluation.held_out):,} images are held out, fewer than the {count:,} generated, "
            "so the floors of distances are too high: the distance of fewer images is larger."
        )
    if "fid" in evaluation.metrics and not evaluation.why_skipped("fid") and count < FEW_FOR_FID:
        lines.append(f"Warning: FID of {count} images is mostly bias: compare it only with its floor at the same N.")
    return lines
