"""The scores of a set of images, by name: each with its error, its floor (what real images score) and its N.

A score is a list of entries, dicts with "id", "value", "se", "floor", "n_gen", "n_ref", "lower_is_better" and
"extra", or "status": "skipped" and "reason" where it cannot be had. The id names what is measured, to the network.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from . import UserError, feature_scores, likelihood
from .features import Features, extract, images_at, load_extractor
from .inception import MissingWeights
from .memorization import memorization_report, pairs_sheet
from .reference import Reference, read_reference, reference_of


FEWEST = 40  # images, two for each of the blocks that an error is estimated from


@dataclass
class Evaluation:
    """All that scores are computed from; every process has the same, and calls `score` on it.

    Attributes:
        images: uint8 (N, C, H, W), generated. With `seed_ranges` R, R successive sets that are scored apart.
        train, held_out: ImageSets of real images; `held_out` may be None.
        model: the Pretrained, for bits_per_dim; None if only images are known.
        features: the extractor that precision_recall and kid look through.
        options: of each extractor's loader, by its name.
        bound_images, bound_timesteps: of bits_per_dim; None for all of them.
        reference_file, reference_pipeline: statistics to take for FID instead of those of `train`.
        asked: the names of the classes that were asked for, in turn: image k is to be of class `asked[k % len]`.
        pairs_path: where memorization draws the closest pairs; None: nowhere.
    """

    images: torch.Tensor
    train: Any
    held_out: Any = None
    model: Any = None
    features: str = "inception"
    options: dict = field(default_factory=dict)
    batch_size: int = 64
    seed_ranges: int = 1
    bound_images: int | None = 1000
    bound_timesteps: int | None = 20
    seed: int = 0
    reference_file: str | None = None
    reference_pipeline: str | None = None
    cache_dir: str | None = None
    asked: list[str] | None = None
    pairs_path: Any = None
    extractors: dict = field(default_factory=dict)  # by name: the module, or why it cannot be had
    generated: dict = field(default_factory=dict)  # by name: the features of `images`, once computed
    real: dict = field(default_factory=dict)  # by name: the References of train and held_out, once computed


def extractor_of(name: str, evaluation: Evaluation) -> str | None:
    """Return the name of the extractor that a score looks through, or None."""
    fixed = {"fid": "inception", "inception_score": "inception", "fd_dinov2": "dinov2", "fd_mnist": "digits"}
    return evaluation.features if name in ("kid", "precision_recall") else fixed.get(name)


def is_digits(image_set) -> bool:
    """Return whether a set is MNIST by its looks: ten classes called 0 to 9 in grey, 28 px, or 32 with a border."""
    names, size = image_set.class_names, image_set.resolution
    return names == list("0123456789") and image_set.channels == 1 and size in (28, 32)


def check_names(names: list[str]):
    """Refuse a name that is none of `SCORES`, with a UserError."""
    for name in names:
        if name not in SCORES:
            raise UserError(f"there is no metric {name!r}: choose from {', '.join(SCORES)}.")


def skipped(name: str, evaluation: Evaluation) -> str | None:
    """Return why a score cannot be had, once the extractors are open, or None."""
    extractor = evaluation.extractors.get(extractor_of(name, evaluation))
    return extractor if isinstance(extractor, str) else None


def has_floor(evaluation: Evaluation) -> bool:
    """Return whether enough images are held out for a floor."""
    return evaluation.held_out is not None and len(evaluation.held_out) >= FEWEST


def check_count(names: list[str], evaluation: Evaluation, num_images: int):
    """Refuse, with a UserError, fewer images than a score of features can be estimated from."""
    if len(evaluation.train) < FEWEST:
        raise UserError(f"there are only {len(evaluation.train)} real images to compare with: give at least {FEWEST}.")
    for name in names:
        looks = extractor_of(name, evaluation) is not None and not skipped(name, evaluation)
        if looks and num_images < FEWEST * evaluation.seed_ranges:
            raise UserError(f"{name} of {num_images} images says nothing: give at least {FEWEST} per seed range.")


def open_extractors(names: list[str], evaluation: Evaluation):
    """Load what the scores `names` need and try it on two real images, so that what cannot be is told before the work.

    Raises:
        UserError: for images that an extractor does not take, statistics of another pipeline, a model without bound.
    """
    check_names(names)
    for name in names:
        if name == "bits_per_dim" and evaluation.model is None:
            raise UserError("bits_per_dim is of a model, and only samples are given: give the model, or leave it out.")
        extractor = extractor_of(name, evaluation)
        if extractor is None or extractor in evaluation.extractors:
            continue
        try:
            module = load_extractor(extractor, **evaluation.options.get(extractor, {}))
            module(images_at(evaluation.train, range(2)).to(PartialState().device))
        except MissingWeights as error:
            module = str(error)
        evaluation.extractors[extractor] = module
    if evaluation.reference_file is not None and "fid" not in names:
        raise UserError("--reference is for fid: add it to --metrics, or leave the file out.")
    if "bits_per_dim" in names:
        check_labels(evaluation)
    if evaluation.reference_file is not None:
        inception = evaluation.extractors["inception"]
        if not isinstance(inception, str):
            read_reference(evaluation.reference_file, inception, evaluation.reference_pipeline)


def check_labels(evaluation: Evaluation):
    """Refuse, with a UserError, data that does not tell a conditional model which classes to condition on."""
    classes = evaluation.model.unet.config.num_class_embeds
    labels = (evaluation.held_out or evaluation.train).labels
    if classes is not None and (labels is None or labels.min() < 0 or labels.max() >= classes):
        raise UserError(f"bits_per_dim of this model needs a class from 0 to {classes - 1} for each real image.")
    known = evaluation.model.class_names
    if known is not None and known != evaluation.train.class_names:
        raise UserError(
            f"bits_per_dim: the model's classes are {', '.join(known)}, the data's "
            f"{', '.join(evaluation.train.class_names)}: give data of the same classes, see --class_names."
        )


def score(names: list[str], evaluation: Evaluation) -> list[dict]:
    """Return the entries of the scores `names` on the main process, [] or parts of them on the others.

    Raises:
        UserError: for fewer images than an error can be estimated from, or what `open_extractors` refuses.
    """
    open_extractors(names, evaluation)
    check_count(names, evaluation, len(evaluation.images))
    entries = []
    for name in names:
        extractor = extractor_of(name, evaluation)
        if reason := skipped(name, evaluation):
            entries.append({"id": name, "status": "skipped", "reason": reason})
        elif extractor is None:
            entries += SCORES[name](evaluation)
        else:
            sets = _features(evaluation, extractor)  # all processes work on these
            if PartialState().is_main_process:
                entries += SCORES[name](evaluation, extractor, *sets)
    return list({entry["id"]: entry for entry in entries}.values())  # two scores may share a number


def _features(evaluation: Evaluation, name: str) -> tuple[Features, Reference, Reference | None]:
    """Return the features of the generated images, and the References of the train and of the held-out images."""
    extractor, size, cache = evaluation.extractors[name], evaluation.batch_size, evaluation.cache_dir
    if name not in evaluation.real:
        train = reference_of(extractor, evaluation.train, "training images", size, cache)
        held_out = None
        if has_floor(evaluation):
            held_out = reference_of(extractor, evaluation.held_out, "held-out images", size, cache)
        evaluation.real[name] = train, held_out
    if name not in evaluation.generated:
        evaluation.generated[name] = extract(extractor, evaluation.images, None, size, "generated images")
    return evaluation.generated[name], *evaluation.real[name]


def bits_per_dim(evaluation):
    """Return the variational bound on held-out images (training ones where none are held out), in bits per dimension.

    Every process takes its share of the images; the noise of an image is keyed by its number.
    """
    model, state = evaluation.model, PartialState()
    split = "train" if evaluation.held_out is None else "held_out"
    source = evaluation.train if evaluation.held_out is None else evaluation.held_out
    count = min(evaluation.bound_images or len(source), len(source))
    rows = torch.linspace(0, len(source) - 1, count).round().long().tolist()
    unet, timesteps = model.unet.to(state.device), evaluation.bound_timesteps
    labels = None if unet.config.num_class_embeds is None else source.labels
    mode = "full" if timesteps is None or timesteps >= len(model.scheduler) else f"{timesteps} of T terms"
    options = dict(seed=evaluation.seed, batch_size=evaluation.batch_size, progress=state.is_main_process)

    def about(numbers):
        of_these = None if labels is None else labels[numbers]
        return (unet, model.scheduler, images_at(source, numbers), numbers), options | {"class_labels": of_these}

    pilot = None
    if mode != "full":
        arguments, more = about(rows[:: -(-len(rows) // likelihood.num_pilot_images(len(model.scheduler)))])
        pilot = [likelihood.pilot_probabilities(*arguments, **more) if state.is_main_process else None]
        pilot = broadcast_object_list(pilot)[0]
    share = rows[state.process_index :: state.num_processes]
    bounds = []
    if share:
        arguments, more = about(share)
        terms = None if mode == "full" else timesteps
        result = likelihood.bits_per_dim(*arguments, num_timesteps=terms, pilot=pilot, **more)
        bounds = [(number, {name: values[k] for name, values in result.items()}) for k, number in enumerate(share)]
    bounds = [bound for _, bound in sorted(gather_object(bounds), key=lambda pair: pair[0])]
    summary = likelihood.summarise({name: torch.stack([bound[name] for bound in bounds]) for name in bounds[0]})
    entry = feature_scores.entry("bits_per_dim", summary["bits_per_dim"], True, None, None, count)
    extra = {name: summary[name] for name in ("L0", "L1_to_last", "prior")} | {"floored_share": summary["floored"]}
    extra |= {"split": split, "mode": mode, "variance_type": model.scheduler.config.variance_type, "decoder": "tanh"}
    extra["bound"] = "upper" if summary["floored"] == 0 else "none: some pixels are at the decoder's floor"
    return [entry | {"se": summary["standard_error"], "se_method": "over images", "unit": "bits/dim", "extra": extra}]


def memorization(evaluation):
    """Return how near the images are to training images, beside what held-out images score; draw the closest pairs."""
    if not PartialState().is_main_process:
        return []
    images = evaluation.images
    train = images_at(evaluation.train, range(len(evaluation.train)))
    held_out = None
    if has_floor(evaluation):
        held_out = images_at(evaluation.held_out, range(len(evaluation.held_out)))
    report, pairs = memorization_report(images, train, held_out)
    entries = []
    for name, lower in [("share_below_threshold", True), ("authpct", False), ("median_ratio", False)]:
        if report[name] is not None:
            floor = report[f"{name}_held_out"]
            entries.append(
                feature_scores.entry(f"memorization_{name}", report[name], lower, floor, len(images), len(train))
            )
    for name in ("exact_copies", "duplicates"):
        entries.append(feature_scores.entry(f"memorization_{name}", report[name], True, 0, len(images), len(train)))
    if evaluation.pairs_path is not None:
        pairs_sheet(images, train, pairs, evaluation.pairs_path)
        entries[0]["extra"] = {"pairs": [list(pair) for pair in pairs], "sheet": evaluation.pairs_path.name}
    return entries


SCORES = {
    "fid": feature_scores.fid,
    "inception_score": feature_scores.inception_score,
    "kid": feature_scores.kid,
    "precision_recall": feature_scores.precision_recall,
    "fd_dinov2": feature_scores.fd_dinov2,
    "fd_mnist": feature_scores.fd_mnist,
    "bits_per_dim": bits_per_dim,
    "memorization": memorization,
}
