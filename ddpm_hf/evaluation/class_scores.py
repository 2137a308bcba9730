"""The metrics fd_mnist and fd_cifar10. They score images with the small classifiers of MNIST and CIFAR-10."""

import torch
from torch import Tensor

from . import statistics
from .feature_scores import frechet, precision_recall
from .metric_input import Look, random_rows
from .reference import kept_rows


def classifier_scores(look: Look) -> list[dict]:
    """Score the images with a SmallClassifier: distances in its features, class balance, confidence, coverage.

    The Fréchet distances are not FID. Their ids contain the hash of the classifier, because values of different
    classifiers cannot be compared. If images were drawn by class, and the classifier knows these classes, another
    score is the share of images that it assigns to the requested class.
    """
    entries = frechet(look, f"{look.extractor.metric}-{look.extractor.sha256[:8]}_{look.count}")
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
    # Half of Wilson's interval (1927) for z = 1. The usual sqrt(p (1 - p) / n) is 0 if all images are right.
    error = (value * (1 - value) / n + 1 / (4 * n**2)) ** 0.5 / (1 + 1 / n)
    return look.entry("class_accuracy", value, lower_is_better=False, se=error, se_method="Wilson", floor=floor)


def knows(known: tuple[str, ...], names: list[str] | None) -> bool:
    """Return True if `names` is not empty, and `known` (the classes of a classifier) contains every name."""
    return bool(names) and set(names) <= set(known)


def class_numbers(names: list[str], known: tuple[str, ...]) -> Tensor:
    """Return the index in `known` of each name, int64 (len(names),)."""
    return torch.tensor([known.index(name) for name in names])


def class_counts(image_set, logits: Tensor, known: tuple[str, ...]) -> Tensor:
    """Return how many images each class in `known` has, int64 (k,).

    Count the labels of the images. If there are no labels, or if `known` lacks one of their classes, guess the class
    of each image from its `logits` (N, k).
    """
    if not knows(known, image_set.class_names):
        return torch.bincount(logits.argmax(dim=1), minlength=len(known))
    numbers = class_numbers(image_set.class_names, known)
    return torch.bincount(numbers[image_set.labels[image_set.labels >= 0]], minlength=len(known))
