"""The scores that look at images through a network: FID and its kin, kernel distance, precision and recall.

Each takes the Evaluation (see scores.py), the extractor's name, the generated images' Features and the References of
the training and of the held-out images (or None), and returns entries. The floor is what held-out images score.
"""

import torch
from accelerate import PartialState

from . import metrics
from .features import Features, extractor_id
from .metrics import mean_and_covariance
from .randomness import keyed_generator
from .reference import Reference, read_reference


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
    report = metrics.class_report(generated.logits, wanted)
    n = len(generated.logits)
    real = {} if held_out is None else metrics.class_report(some(held_out.logits, n), wanted)
    for key, label, lower in [
        ("total_variation", "class_total_variation", True),
        ("mean_confidence", "class_confidence", False),
        ("mean_entropy", "class_entropy_nats", True),
    ]:
        entries.append(entry(label, report[key], lower, real.get(key), n, train.num_samples, evaluation, name))
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
    one = entry("class_accuracy", value, False, floor, n, None, evaluation, name)
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
            return metrics.kernel_distance(
                *(metrics.standardise(each, train.features) for each in (features, train.features))
            )
        return metrics.kernel_distance(features, train.features)

    n = len(generated.features) // evaluation.seed_ranges  # of the first seed range
    value, error = distance(generated.features[:n])
    floor = None if held_out is None else distance(some(held_out.features, n))[0]
    id = f"kid{count(evaluation)}_full" + ("" if name == "inception" else f"_{name}")
    one = entry(id, value, True, floor, n, len(train.features), evaluation, name)
    return [one | {"se": error, "se_method": "disjoint blocks"}]


def precision_recall(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return precision, recall, density and coverage, of at most as many generated as there are real features."""
    numbers = generated.features[: len(train.features)]
    values = metrics.precision_recall(train.features, numbers, NEIGHBOURS)
    floors = {}
    if held_out is not None:
        floors = metrics.precision_recall(train.features, some(held_out.features, len(numbers)), NEIGHBOURS)
    entries = []
    for key, value in values.items():
        id = f"{key}{short(len(numbers))}_k{NEIGHBOURS}_{name}"
        sizes = len(numbers), len(train.features)
        entries.append(entry(id, value, False, floors.get(key), *sizes, evaluation, name))
    return entries


def inception_score(evaluation, name, generated, train, held_out) -> list[dict]:
    """Return the Inception score over 10 splits in the order of the seeds; its error is that of the splits' mean."""
    n = len(generated.logits) // evaluation.seed_ranges  # of the first seed range
    value, deviation = metrics.inception_score(generated.logits[:n], SPLITS)
    floor = None if held_out is None else metrics.inception_score(some(held_out.logits, n), SPLITS)[0]
    one = entry(f"is{count(evaluation)}", value, False, floor, n, None, evaluation, name)
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
        distances = [metrics.frechet_distance(*mean_and_covariance(features), *target) for features in sets]
        values, extra, floor = [value for value, _ in distances], {"mean_term": distances[0][1]}, None
        if kind == "full" and held_out is not None:
            # At the same N, where there are as many: the distance of few images is mostly its bias.
            real = some(held_out.features, len(sets[0])).to(device)
            floor = metrics.frechet_distance(*mean_and_covariance(real), *target)[0]
            extra["floor_n"] = len(real)
        if len(sets[0]) >= ENOUGH_TO_EXTRAPOLATE:
            extra["at_infinity"] = metrics.frechet_at_infinity(sets[0], *target)
        one = entry(
            f"{stem}_{kind}{tail}", values[0], True, floor, len(sets[0]), reference.num_samples, evaluation, name
        )
        if len(values) > 1:
            spread = torch.tensor(values, dtype=torch.float64).std().item()
            extra |= {"seed_ranges": values, "min": min(values), "std": spread}
            one |= {"value": sum(values) / len(values), "se": spread / len(values) ** 0.5, "se_method": "seed ranges"}
        else:
            one |= {"se": metrics.frechet_standard_error(sets[0], *target), "se_method": "jackknife, 20 blocks"}
        entries.append(one | {"extra": extra})
    return entries


def some(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Return n of the rows of real images, or all if there are fewer, shuffled: files often come class by class."""
    return rows[torch.randperm(len(rows), generator=keyed_generator(0, "floor"))[:n]]


def entry(id, value, lower_is_better, floor, n_gen, n_ref, evaluation=None, name=None) -> dict:
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
