"""The metrics: a function for each metric, and the table METRICS with their names.

A metric takes a `Look` and returns entries for the record. An entry is a dict with "id", "value", "se" (the standard
error of the value), "floor" (the value for real images), "n_gen", "n_ref", "lower_is_better" and "extra". The id names
the measure and the network.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..diffusion import likelihood
from ..errors import UserError
from ..processes import gather_in_order
from ..randomness import keyed_generator
from . import statistics
from .extractor import CLASSIFIERS, extractor_id
from .features import Features, images_at
from .memorization import memorization_report, pairs_sheet
from .reference import Reference, kept_rows, read_reference
from .statistics import mean_and_covariance


FEWEST = 40  # images, because a standard error is estimated from 20 blocks of at least 2 images
NEIGHBOURS = 3  # k of precision, recall, density and coverage, as in Kynkäänniemi et al. 2019 and ADM
SPLITS = 10  # the Inception score is the mean over this many parts of the images
ENOUGH_TO_EXTRAPOLATE = 5000  # images; with fewer images, FID at infinity is mostly noise


@dataclass(frozen=True)
class Look:
    """The input of a metric. The last four attributes are None for a metric without an extractor.

    `look.entry(id, value, lower_is_better=..., se=..., floor=...)` makes an entry.

    Attributes:
        evaluation: `evaluation.train` and `evaluation.held_out` are the real images (`get(rows)` returns float32
            images in [-1, 1]), and `evaluation.model` is the model, as `load` returns it.
        images: the generated images, uint8 (N, C, H, W).
        extractor: the network that extracted the features.
        generated: the features of the generated images.
        train: the Reference of the training images.
        held_out: the Reference of the held-out images; None if fewer than FEWEST are held out.
    """

    evaluation: Any
    images: Tensor
    extractor: nn.Module | None = None
    generated: Features | None = None
    train: Reference | None = None
    held_out: Reference | None = None

    def entry(
        self,
        id: str,
        value: float,
        *,
        lower_is_better: bool,
        se: float | None = None,
        se_method: str | None = None,
        floor: float | None = None,
        n_gen: int | None = None,
        n_ref: int | None = None,
    ) -> dict:
        """Return an entry for the record.

        Args:
            se, se_method: the standard error of the value, and in a few words how it was computed.
            floor: the value of real images.
            n_gen, n_ref: the numbers of images that the value was computed from, generated and real. None for `n_gen`:
                the number of images.
        """
        return {
            "id": id,
            "value": value,
            "se": se,
            "se_method": se_method,
            "floor": floor,
            "n_gen": len(self.images) if n_gen is None else n_gen,
            "n_ref": n_ref,
            "lower_is_better": lower_is_better,
            **({} if self.extractor is None else {"extractor": extractor_id(self.extractor)}),
            "extra": {},
        }

    @property
    def count(self) -> str:
        """The number of generated images in the form of ids, e.g. 50k."""
        return format_count(len(self.images))


def fid(look: Look) -> list[dict]:
    """Return the Fréchet Inception distances (Heusel et al. 2017) to the training images and to the held-out ones."""
    evaluation = look.evaluation
    train = look.train
    if evaluation.reference_file is not None:
        train = read_reference(evaluation.reference_file, look.extractor, evaluation.reference_pipeline)
    return frechet(look, f"fid{look.count}", tail_of(look), train)


def tail_of(look: Look) -> str:
    """Return the end of an id that names how Inception's images are resized. It is empty for tf1, the default."""
    extractor = look.extractor
    return f"_{extractor.pipeline}" if extractor.name == "inception" and extractor.pipeline != "tf1" else ""


def fd_dinov2(look: Look) -> list[dict]:
    """Return the Fréchet distances in the features of DINOv2 (Stein et al. 2023)."""
    return frechet(look, f"fd_dinov2_{look.count}")


def fd_mnist(look: Look) -> list[dict]:
    """Return the scores of the digit classifier: distances in its features, class balance, confidence, coverage.

    The Fréchet distances are not FID. Their ids contain the hash of the classifier, because values of different
    classifiers cannot be compared. If digits were requested, their accuracy is a score too.
    """
    return classifier_scores(look, "fd_mnist")


def fd_cifar10(look: Look) -> list[dict]:
    """Return the scores of the CIFAR-10 classifier. They are those of `fd_mnist`, for color images."""
    return classifier_scores(look, "fd_cifar10")


def classifier_scores(look: Look, stem: str) -> list[dict]:
    """Return the scores of a SmallClassifier. `stem` is the beginning of the ids of the Fréchet distances."""
    entries = frechet(look, f"{stem}-{look.extractor.sha256[:8]}_{look.count}")
    coverage = precision_recall(look)[-1]
    wanted = class_counts(look.evaluation.train, look.train.logits, look.extractor.class_names)
    report = statistics.class_report(look.generated.logits, wanted)
    n = len(look.generated.logits)
    real = {}
    if look.held_out is not None:
        real = statistics.class_report(random_rows(look.held_out.logits, n), wanted)
    for key, id, lower in [
        ("total_variation", "class_total_variation", True),
        ("mean_confidence", "class_confidence", False),
        ("mean_entropy", "class_entropy_nats", True),
    ]:
        n_ref = look.train.num_samples
        entries.append(look.entry(id, report[key], lower_is_better=lower, floor=real.get(key), n_ref=n_ref))
    entries[-3]["extra"] = {"frequencies": report["frequencies"]}
    if knows(look.extractor.class_names, look.evaluation.requested_classes):
        entries.append(class_accuracy(look))
    return [*entries, coverage]


def class_accuracy(look: Look) -> dict:
    """Return the share of generated images that the classifier assigns to the requested class."""
    n = len(look.generated.logits)
    known = look.extractor.class_names
    requested = class_numbers(look.evaluation.requested_classes, known)
    right = look.generated.logits.argmax(dim=1) == requested[torch.arange(n) % len(requested)]
    value = right.double().mean().item()
    floor = None
    real = look.evaluation.held_out
    if look.held_out is not None and knows(known, real.class_names):
        # The floor is the accuracy on real images of the requested classes.
        labels = real.labels[kept_rows(len(real.labels))]
        numbers = class_numbers(real.class_names, known)[labels]
        comparable = torch.isin(numbers, requested) & (labels >= 0)
        if comparable.any():
            floor = (look.held_out.logits.argmax(dim=1) == numbers)[comparable].double().mean().item()
    # Half of Wilson's interval (1927) for z = 1. The usual sqrt(p (1 - p) / n) says 0 if all images are right.
    error = (value * (1 - value) / n + 1 / (4 * n**2)) ** 0.5 / (1 + 1 / n)
    return look.entry("class_accuracy", value, lower_is_better=False, se=error, se_method="Wilson", floor=floor)


def knows(known: tuple[str, ...], names: list[str] | None) -> bool:
    """Return True if there are class names, and all of them are in `known`, the classes of a classifier."""
    return bool(names) and set(names) <= set(known)


def class_numbers(names: list[str], known: tuple[str, ...]) -> Tensor:
    """Return the number of each name in `known`, int64 (len(names),)."""
    return torch.tensor([known.index(name) for name in names])


def class_counts(image_set, logits: Tensor, known: tuple[str, ...]) -> Tensor:
    """Return the number of images of each class in `known`, int64 (k,).

    If the images have no labels, or labels of other classes, guess the classes from `logits` (N, k).
    """
    if not knows(known, image_set.class_names):
        return torch.bincount(logits.argmax(dim=1), minlength=len(known))
    numbers = class_numbers(image_set.class_names, known)
    return torch.bincount(numbers[image_set.labels[image_set.labels >= 0]], minlength=len(known))


def kid(look: Look) -> list[dict]:
    """Return the kernel distance (Binkowski et al. 2018) to the training images.

    Features of the small classifiers are standardized first, because the kernel depends on their scale.
    """
    train = look.train.features
    name = look.extractor.name

    def distance(features):
        if name in CLASSIFIERS:
            features = statistics.standardise(features, train)
            return statistics.kernel_distance(features, statistics.standardise(train, train))
        return statistics.kernel_distance(features, train)

    value, error = distance(look.generated.features)
    floor = None
    if look.held_out is not None:
        floor = distance(random_rows(look.held_out.features, len(look.generated.features)))[0]
    id = f"kid{look.count}_full" + ("" if name == "inception" else f"_{name}") + tail_of(look)
    error = {"se": error, "se_method": "U-statistic"}
    return [look.entry(id, value, lower_is_better=True, **error, floor=floor, n_ref=len(train))]


def precision_recall(look: Look) -> list[dict]:
    """Return precision, recall, density and coverage of the generated images.

    If there are more generated images than real features, only the first generated ones are used, as many as real.
    """
    real = look.train.features
    features = look.generated.features[: len(real)]
    floors = {}
    if look.held_out is not None:
        held_out = random_rows(look.held_out.features, len(features))
        floors = statistics.precision_recall(real, held_out, NEIGHBOURS)
    entries = []
    for key, value in statistics.precision_recall(real, features, NEIGHBOURS).items():
        id = f"{key}{format_count(len(features))}_k{NEIGHBOURS}_{look.extractor.name}{tail_of(look)}"
        sizes = {"n_gen": len(features), "n_ref": len(real)}
        entries.append(look.entry(id, value, lower_is_better=False, floor=floors.get(key), **sizes))
    return entries


def inception_score(look: Look) -> list[dict]:
    """Return the Inception score (Salimans et al. 2016), i.e. the mean over 10 splits of the images, and its error."""
    value, deviation = statistics.inception_score(look.generated.logits, SPLITS)
    floor = None
    if look.held_out is not None:
        logits = random_rows(look.held_out.logits, len(look.generated.logits))
        floor = statistics.inception_score(logits, SPLITS)[0]
    error = {"se": deviation / SPLITS**0.5, "se_method": "splits"}
    entry = look.entry(f"is{look.count}{tail_of(look)}", value, lower_is_better=False, **error, floor=floor)
    return [entry | {"extra": {"std_over_splits": deviation}}]


def frechet(look: Look, stem: str, tail: str = "", train: Reference | None = None) -> list[dict]:
    """Return the Fréchet distances to the training images ("full") and to the held-out ones ("test").

    Args:
        stem, tail: the beginning and the end of the id.
        train: statistics to use in place of the statistics of the training images.
    """
    device = PartialState().device  # roots of large matrices are fast on a GPU
    features = look.generated.features.to(device)
    references = {"full": train or look.train} | ({} if look.held_out is None else {"test": look.held_out})
    entries = []
    for kind, reference in references.items():
        target = reference.mean.to(device), reference.covariance.to(device)
        value, mean_term = statistics.frechet_distance(*mean_and_covariance(features), *target)
        extra = {"mean_term": mean_term}
        floor = None
        if kind == "full" and look.held_out is not None:
            # Take as many real images as generated ones, if there are enough, because the bias depends on N.
            real = random_rows(look.held_out.features, len(features)).to(device)
            floor = statistics.frechet_distance(*mean_and_covariance(real), *target)[0]
            extra["floor_n"] = len(real)
        if len(features) >= ENOUGH_TO_EXTRAPOLATE:
            extra["at_infinity"] = statistics.frechet_at_infinity(features, *target)
        id = f"{stem}_{kind}{tail}"
        error = statistics.frechet_standard_error(features, *target)
        error = {"se": error, "se_method": "jackknife, 20 blocks"}
        entry = look.entry(id, value, lower_is_better=True, **error, floor=floor, n_ref=reference.num_samples)
        entries.append(entry | {"extra": extra})
    return entries


def bits_per_dim(look: Look) -> list[dict]:
    """Return the variational bound (Ho et al. 2020) on the held-out images, in bits per dimension.

    Without held-out images, the training images are used. Every process computes the bound of a share of the images.
    The noise of an image depends only on the number of the image.
    """
    evaluation = look.evaluation
    state = PartialState()
    model = evaluation.model
    timesteps = evaluation.bound_timesteps
    split = "train" if evaluation.held_out is None else "held_out"
    source, rows, few = bound_rows(evaluation)
    unet = model.unet.to(state.device)
    mode = "full" if few is None else f"{timesteps} of T terms"

    def bound(function, numbers, **more):
        labels = source.labels[numbers] if model.classes else None
        options = {"batch_size": evaluation.batch_size, "progress": state.is_main_process, "class_labels": labels}
        return function(unet, model.scheduler, images_at(source, numbers), numbers, **options, **more)

    pilot = None
    if few is not None:
        pilot = [bound(likelihood.pilot_probabilities, few) if state.is_main_process else None]
        pilot = broadcast_object_list(pilot)[0]
    share = rows[state.process_index :: state.num_processes]
    bounds = []
    if share:
        terms = None if few is None else timesteps
        result = bound(likelihood.bits_per_dim, share, num_timesteps=terms, pilot=pilot)
        bounds = [{name: values[k] for name, values in result.items()} for k in range(len(share))]
    bounds = gather_in_order(share, bounds)
    summary = likelihood.summarise({name: torch.stack([one[name] for one in bounds]) for name in bounds[0]})
    error = {"se": summary["standard_error"], "se_method": "over images"}
    entry = look.entry("bits_per_dim", summary["bits_per_dim"], lower_is_better=True, **error, n_ref=len(rows))
    extra = {
        **{name: summary[name] for name in ("L0", "L1_to_last", "prior")},
        "floored_share": summary["floored"],
        "split": split,
        "mode": mode,
        "variance_type": model.scheduler.config.variance_type,
        "decoder": "tanh",
        "bound": "upper" if summary["floored"] == 0 else "none: some pixels are at the decoder's floor",
    }
    return [entry | {"n_gen": None, "unit": "bits/dim", "extra": extra}]


def bound_rows(evaluation) -> tuple[Any, list[int], list[int] | None]:
    """Return the images of bits_per_dim: their ImageSet, their rows, and those of the pilot.

    There is no pilot, None, if all T terms of each image are computed.
    """
    source = evaluation.train if evaluation.held_out is None else evaluation.held_out
    count = min(evaluation.bound_images or len(source), len(source))
    rows = torch.linspace(0, len(source) - 1, count).round().long().tolist()
    T, timesteps = len(evaluation.model.scheduler), evaluation.bound_timesteps
    if timesteps is None or timesteps >= T:
        return source, rows, None
    most = likelihood.num_pilot_images(T, count * timesteps)
    return source, rows, rows[:: -(-len(rows) // most)]


def bound_evaluations(evaluation) -> int:
    """Return how often bits_per_dim evaluates the network, for one image each time."""
    _, rows, few = bound_rows(evaluation)
    T = len(evaluation.model.scheduler)
    return len(rows) * T if few is None else len(rows) * evaluation.bound_timesteps + len(few) * T


def memorization(look: Look) -> list[dict]:
    """Return how close the generated images are to training images, and draw the closest pairs.

    The floors are the values for held-out images.
    """
    if not PartialState().is_main_process:
        return []
    evaluation = look.evaluation
    images = look.images
    train = images_at(evaluation.train, range(len(evaluation.train)))
    held_out = None
    if has_floor(evaluation):
        held_out = images_at(evaluation.held_out, range(len(evaluation.held_out)))
    report, pairs = memorization_report(images, train, held_out)
    floors = {name: report[f"{name}_held_out"] for name in ("share_below_threshold", "authpct", "median_ratio")}
    floors |= {"exact_copies": 0, "duplicates": 0}
    higher_is_better = ("authpct", "median_ratio")
    entries = [
        look.entry(
            f"memorization_{name}",
            report[name],
            lower_is_better=name not in higher_is_better,
            floor=floor,
            n_ref=len(train),
        )
        for name, floor in floors.items()
        if report[name] is not None
    ]
    if evaluation.pairs_path is not None:
        entries[0]["extra"] = {"pairs": [list(pair) for pair in pairs]}
        try:
            pairs_sheet(images, train, pairs, evaluation.pairs_path)
            entries[0]["extra"]["sheet"] = evaluation.pairs_path.name
        except UserError as error:  # a missing picture must not lose the scores
            PartialState().print(f"Warning: {error}", flush=True)
    return entries


def has_floor(evaluation) -> bool:
    """Return True if at least FEWEST images are held out. Then floors are computed from these images."""
    return evaluation.held_out is not None and len(evaluation.held_out) >= FEWEST


def is_digits(image_set) -> bool:
    """Return True if an ImageSet looks like MNIST: classes 0 to 9, grey, 28x28 or (with a border) 32x32 pixels."""
    names, size = image_set.class_names, image_set.size
    return names == list("0123456789") and image_set.channels == 1 and size in ((28, 28), (32, 32))


def is_cifar10(image_set) -> bool:
    """Return True if an ImageSet looks like CIFAR-10: its ten classes, in color, at 32 px or a multiple of it."""
    names, (height, width) = image_set.class_names, image_set.size
    is_square = height == width and height % 32 == 0
    return names == list(CLASSIFIERS["cifar10"].class_names) and image_set.channels == 3 and is_square


def default_features(image_set) -> str:
    """Return the extractor for metrics that can use any extractor: the digit classifier for MNIST, else Inception."""
    return "digits" if is_digits(image_set) else "inception"


def random_rows(rows: Tensor, n: int) -> Tensor:
    """Return n random rows of `rows` (N, d), or all if N < n.

    The first n rows would be a biased choice, because real images are often sorted by class.
    """
    return rows[torch.randperm(len(rows), generator=keyed_generator(0, "floor"))[:n]]


def format_count(n: int) -> str:
    """Return a number of images in the form of ids: 50k, 2k, 2048."""
    return f"{n // 1000}k" if n % 1000 == 0 and n else str(n)


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    Attributes:
        function: takes a Look and returns entries for the record. A metric with an extractor is called on the main
            process only. A metric without one is called on every process.
        extractor: the network that the metric needs: a name of EXTRACTORS, or "chosen" for the extractor that
            --features names. None: the metric needs only pixels or the model.
        suits: takes (training images, model or None) and returns True if the metric is computed by default.
        hub_names: the names of the metric on the Hub. The key is the beginning of an id, up to the first number:
            {"is": "inception_score"}.
        words: what the metric's scores are, in words for readers. The key is the beginning of an id.

    Example:
        >>> def brightness(look):  # look.images: uint8 (N, C, H, W)
        ...     train = look.evaluation.train
        ...     real = (train.get(range(min(100, len(train)))) + 1) * 127.5
        ...     floor, mean = real.mean().item(), look.images.double().mean().item()
        ...     return [look.entry("brightness", mean, lower_is_better=False, floor=floor)]
        >>> ddpm_hf.METRICS["brightness"] = ddpm_hf.Metric(brightness)
        >>> few = {"num_images": 40, "num_inference_steps": 2}
        >>> result = ddpm_hf.evaluate("runs/digits", metrics=["brightness"], **few)
        Data: 1,797 images; ...
        >>> list(result.scores)
        ['brightness']
    """

    function: Callable[[Look], list[dict]]
    extractor: str | None = None
    suits: Callable[[Any, Any], bool] = lambda train, model: False
    hub_names: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def _photos(train, model) -> bool:
    return not is_digits(train) and train.channels in (1, 3)


CLOSENESS = {
    "precision": "precision: share of images among the real ones",
    "recall": "recall: share of real images among the generated ones",
    "density": "density: real neighbours of an image",
    "coverage": "coverage: share of real images with a neighbour",
}
CLASSIFIED = {
    "fd_mnist": "Fréchet distance of a digit classifier's features",
    "fd_cifar10": "Fréchet distance of a CIFAR-10 classifier's features",
    "class_total_variation": "distance of the class shares from the real ones",
    "class_confidence": "confidence of the classifier",
    "class_entropy": "entropy of the classifier's guesses, in nats",
    "class_accuracy": "share of images of the requested class",
}
COPIES = {
    "memorization_share": "share of images close to a training image",
    "memorization_authpct": "images that are authentic, in %",
    "memorization_median": "distance to training images, divided by that of held-out images",
    "memorization_exact": "exact copies of training images",
    "memorization_duplicates": "duplicates among the images",
}
METRICS = {
    "fid": Metric(fid, "inception", _photos, {"fid": "fid"}, {"fid": "FID"}),
    "kid": Metric(kid, "chosen", _photos, {"kid": "kid"}, {"kid": "KID"}),
    "precision_recall": Metric(
        precision_recall, "chosen", _photos, {"precision": "precision", "recall": "recall"}, CLOSENESS
    ),
    "inception_score": Metric(
        inception_score, "inception", _photos, {"is": "inception_score"}, {"is": "Inception score"}
    ),
    "fd_dinov2": Metric(fd_dinov2, "dinov2", words={"fd_dinov2": "Fréchet distance of DINOv2's features"}),
    "fd_mnist": Metric(fd_mnist, "digits", lambda train, model: is_digits(train), words=CLASSIFIED),
    "fd_cifar10": Metric(fd_cifar10, "cifar10", lambda train, model: is_cifar10(train), words=CLASSIFIED),
    "bits_per_dim": Metric(
        bits_per_dim, None, lambda train, model: model is not None, words={"bits_per_dim": "bits per dimension"}
    ),
    "memorization": Metric(memorization, None, lambda train, model: True, words=COPIES),
}


def in_words(id: str) -> str | None:
    """Return what the score with this id is, in words, or None for a metric without words."""
    words = {start: words for metric in METRICS.values() for start, words in metric.words.items()}
    start = next((start for start in words if re.match(rf"{re.escape(start)}(?![a-z])", id)), None)
    return None if start is None else words[start] + (", to held-out images" if "_test" in id else "")
