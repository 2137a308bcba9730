"""The metrics in the features of a network: Fréchet distances, KID, precision, recall and the Inception score."""

from accelerate import PartialState

from . import statistics
from .extractor import CLASSIFIERS
from .metric_input import Look, format_count, random_rows
from .reference import Reference, read_reference
from .statistics import mean_and_covariance


NEIGHBOURS = 3  # k of precision, recall, density and coverage, as in Kynkäänniemi et al. 2019 and ADM
SPLITS = 10  # the Inception score is the mean over this many parts of the images
ENOUGH_TO_EXTRAPOLATE = 5000  # images; with fewer images, FID at infinity is mostly noise


def fid(look: Look) -> list[dict]:
    """Return the Fréchet Inception distances (Heusel et al. 2017) to the training images and to the held-out ones."""
    evaluation = look.evaluation
    train = look.train
    if evaluation.reference_file is not None:
        train = read_reference(evaluation.reference_file, look.extractor, evaluation.reference_pipeline)
    return frechet(look, f"fid{look.count}", tail_of(look), train)


def fd_dinov2(look: Look) -> list[dict]:
    """Return the Fréchet distances in the features of DINOv2 (Stein et al. 2023)."""
    return frechet(look, f"fd_dinov2_{look.count}")


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

    If there are more generated images than features of real images, the last generated images are left out.
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
    """Return the Inception score (Salimans et al. 2016) and its error. The score is the mean over 10 parts."""
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
        stem, tail: the beginning and the end of the ids of the entries.
        train: statistics to use in place of those of the training images.
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


def tail_of(look: Look) -> str:
    """Return the end of an id: how images are resized for Inception, e.g. "_pytorch". Return "" for the default."""
    extractor = look.extractor
    return f"_{extractor.pipeline}" if extractor.name == "inception" and extractor.pipeline != "tf1" else ""
