"""The scores of a set of images, by name: each with its error, its floor (what real images score) and its N.

A score is a list of entries, dicts with "id", "value", "se", "floor", "n_gen", "n_ref", "lower_is_better" and
"extra", or "status": "skipped" and "reason" where it cannot be had. The id names what is measured, to the network.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..diffusion import likelihood
from ..errors import UserError
from ..randomness import keyed_generator
from . import statistics
from .extractor import extractor_id, load_extractor
from .features import Features, extract, images_at
from .inception import MissingWeights
from .memorization import memorization_report, pairs_sheet
from .reference import Reference, read_reference, reference_of
from .statistics import mean_and_covariance


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
    entry = score_entry("bits_per_dim", summary["bits_per_dim"], True, None, None, count)
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
            entries.append(score_entry(f"memorization_{name}", report[name], lower, floor, len(images), len(train)))
    for name in ("exact_copies", "duplicates"):
        entries.append(score_entry(f"memorization_{name}", report[name], True, 0, len(images), len(train)))
    if evaluation.pairs_path is not None:
        pairs_sheet(images, train, pairs, evaluation.pairs_path)
        entries[0]["extra"] = {"pairs": [list(pair) for pair in pairs], "sheet": evaluation.pairs_path.name}
    return entries


NEIGHBOURS = 3  # k of precision, recall, density and coverage, as Kynkaanniemi et al. 2019 and ADM
SPLITS = 10  # of the Inception score
ENOUGH_TO_EXTRAPOLATE = 5000  # images from which FID at infinity says more than noise


def fid(evaluation, name: str, generated: Features, train: Reference, held_out: Reference | None) -> list[dict]:
    """Return the Frechet Inception distance to the training images, and to those held out."""
    pipeline = evaluation.extractors[name].pipeline
    tail = "" if pipeline == "tf1" else f"_{pipeline}"
    if evaluation.reference_file is not None:
        train = read_reference(evaluation.reference_file, evaluation.extractors[name], evaluation.reference_pipeline)
    return frechet(evaluation, name, f"fid{count(evaluation)}", tail, generated, train, held_out)


def fd_dinov2(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return the Frechet distance in the features of DINOv2 (Stein et al. 2023)."""
    return frechet(evaluation, name, f"fd_dinov2_{count(evaluation)}", "", generated, train, held_out)


def fd_mnist(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return the Frechet distance in the pinned digit classifier's features, coverage, class balance, confidence.

    The distance is not FID: its id has the classifier's hash, and values of another classifier do not compare.
    """
    stem = f"fd_mnist-{evaluation.extractors[name].sha256[:8]}_{count(evaluation)}"
    entries = frechet(evaluation, name, stem, "", generated, train, held_out)
    coverage = precision_recall(evaluation, name, generated, train, held_out)[-1]
    wanted = digit_counts(evaluation.train, train.logits)
    report = statistics.class_report(generated.logits, wanted)
    n = len(generated.logits)
    real = {} if held_out is None else statistics.class_report(some(held_out.logits, n), wanted)
    for key, label, lower in [
        ("total_variation", "class_total_variation", True),
        ("mean_confidence", "class_confidence", False),
        ("mean_entropy", "class_entropy_nats", True),
    ]:
        entries.append(score_entry(label, report[key], lower, real.get(key), n, train.num_samples, evaluation, name))
    entries[-3]["extra"] = {"frequencies": report["frequencies"]}
    if evaluation.asked is not None and are_digits(evaluation.asked):
        entries.append(class_accuracy(evaluation, name, generated, held_out))
    return [*entries, coverage]


def class_accuracy(evaluation, name, generated, held_out) -> dict:
    """Return the share of images that the classifier takes for the class that was asked for."""
    n, asked = len(generated.logits), torch.tensor([int(digit) for digit in evaluation.asked])
    value = (generated.logits.argmax(dim=1) == asked[torch.arange(n) % len(asked)]).double().mean().item()
    floor, real = None, evaluation.held_out
    if held_out is not None and are_digits(real.class_names):
        # Of real images of the classes asked for.
        digits = torch.tensor([int(digit) for digit in real.class_names])[real.labels]
        of_these = torch.isin(digits, asked) & (real.labels >= 0)
        floor = (held_out.logits.argmax(dim=1) == digits)[of_these].double().mean().item()
    one = score_entry("class_accuracy", value, False, floor, n, None, evaluation, name)
    return one | {"se": (value * (1 - value) / n) ** 0.5, "se_method": "binomial"}


def are_digits(names: list[str] | None) -> bool:
    """Return whether all of these classes, if any, are digits by name."""
    return bool(names) and set(names) <= set("0123456789")


def digit_counts(image_set, logits) -> torch.Tensor:
    """Return how many images of each digit a set has (10,), by its classes, or by the classifier where it has none."""
    if not are_digits(image_set.class_names):
        return torch.bincount(logits.argmax(dim=1), minlength=10)
    digits = torch.tensor([int(name) for name in image_set.class_names])
    return torch.bincount(digits[image_set.labels[image_set.labels >= 0]], minlength=10)


def kid(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return the kernel distance; features of the digit classifier are standardised first: the kernel has a scale."""

    def distance(features):
        if name == "digits":
            return statistics.kernel_distance(
                *(statistics.standardise(each, train.features) for each in (features, train.features))
            )
        return statistics.kernel_distance(features, train.features)

    n = len(generated.features) // evaluation.seed_ranges  # of the first seed range
    value, error = distance(generated.features[:n])
    floor = None if held_out is None else distance(some(held_out.features, n))[0]
    id = f"kid{count(evaluation)}_full" + ("" if name == "inception" else f"_{name}")
    one = score_entry(id, value, True, floor, n, len(train.features), evaluation, name)
    return [one | {"se": error, "se_method": "disjoint blocks"}]


def precision_recall(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return precision, recall, density and coverage, of at most as many generated as there are real features."""
    numbers = generated.features[: len(train.features)]
    values = statistics.precision_recall(train.features, numbers, NEIGHBOURS)
    floors = {}
    if held_out is not None:
        floors = statistics.precision_recall(train.features, some(held_out.features, len(numbers)), NEIGHBOURS)
    entries = []
    for key, value in values.items():
        id = f"{key}{short(len(numbers))}_k{NEIGHBOURS}_{name}"
        sizes = len(numbers), len(train.features)
        entries.append(score_entry(id, value, False, floors.get(key), *sizes, evaluation, name))
    return entries


def inception_score(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return the Inception score over 10 splits in the order of the seeds; its error is that of the splits' mean."""
    n = len(generated.logits) // evaluation.seed_ranges  # of the first seed range
    value, deviation = statistics.inception_score(generated.logits[:n], SPLITS)
    floor = None if held_out is None else statistics.inception_score(some(held_out.logits, n), SPLITS)[0]
    one = score_entry(f"is{count(evaluation)}", value, False, floor, n, None, evaluation, name)
    one |= {"se": deviation / SPLITS**0.5, "se_method": "splits", "extra": {"std_over_splits": deviation}}
    return [one]


def frechet(evaluation, name, stem, tail, generated, train, held_out) -> list[dict]:
    """Return the Frechet distance of the seed ranges to the training images ("full") and to the held-out ("test")."""
    device = PartialState().device  # roots of large matrices are quick on a GPU
    sets = generated.features.to(device).chunk(evaluation.seed_ranges)
    references = {"full": train} | ({} if held_out is None else {"test": held_out})
    entries = []
    for kind, reference in references.items():
        target = reference.mean.to(device), reference.covariance.to(device)
        distances = [statistics.frechet_distance(*mean_and_covariance(features), *target) for features in sets]
        values, extra, floor = [value for value, _ in distances], {"mean_term": distances[0][1]}, None
        if kind == "full" and held_out is not None:
            # At the same N, where there are as many: the distance of few images is mostly its bias.
            real = some(held_out.features, len(sets[0])).to(device)
            floor = statistics.frechet_distance(*mean_and_covariance(real), *target)[0]
            extra["floor_n"] = len(real)
        if len(sets[0]) >= ENOUGH_TO_EXTRAPOLATE:
            extra["at_infinity"] = statistics.frechet_at_infinity(sets[0], *target)
        one = score_entry(
            f"{stem}_{kind}{tail}", values[0], True, floor, len(sets[0]), reference.num_samples, evaluation, name
        )
        if len(values) > 1:
            spread = torch.tensor(values, dtype=torch.float64).std().item()
            extra |= {"seed_ranges": values, "min": min(values), "std": spread}
            one |= {"value": sum(values) / len(values), "se": spread / len(values) ** 0.5, "se_method": "seed ranges"}
        else:
            one |= {"se": statistics.frechet_standard_error(sets[0], *target), "se_method": "jackknife, 20 blocks"}
        entries.append(one | {"extra": extra})
    return entries


def some(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Return n of the rows of real images, or all if there are fewer, shuffled: files often come class by class."""
    return rows[torch.randperm(len(rows), generator=keyed_generator(0, "floor"))[:n]]


def score_entry(id, value, lower_is_better, floor, n_gen, n_ref, evaluation=None, name=None) -> dict:
    """Return what a record says of one number."""
    one = {"id": id, "value": value, "se": None, "se_method": None, "floor": floor, "n_gen": n_gen, "n_ref": n_ref}
    one["lower_is_better"] = lower_is_better
    if name is not None:
        one["extractor"] = extractor_id(evaluation.extractors[name])
    return one | {"extra": {}}


def count(evaluation) -> str:
    """Return N, the images of one seed range, as ids have it."""
    return short(len(evaluation.images) // evaluation.seed_ranges)


def short(n: int) -> str:
    """Return a number of images as ids have it: 50k, 2k, 2048."""
    return f"{n // 1000}k" if n % 1000 == 0 and n else str(n)


SCORES = {
    "fid": fid,
    "inception_score": inception_score,
    "kid": kid,
    "precision_recall": precision_recall,
    "fd_dinov2": fd_dinov2,
    "fd_mnist": fd_mnist,
    "bits_per_dim": bits_per_dim,
    "memorization": memorization,
}
