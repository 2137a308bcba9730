"""The table METRICS. Each metric has a function, the network that it needs, the data that it suits, and names.

The function takes a `Look` and returns entries for the record. `Look.entry` makes an entry and explains its fields.
The id of an entry names the measure and the network.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .bound import bits_per_dim
from .class_scores import classifier_scores
from .extractor import CLASSIFIERS
from .feature_scores import fd_dinov2, fid, inception_score, kid, precision_recall
from .memorization import memorization
from .metric_input import Look


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    Attributes:
        function: takes a Look and returns entries for the record. A metric with an extractor is called on the main
            process only. A metric without one is called on every process.
        extractor: the network that the metric needs: a name of EXTRACTORS, or "chosen" for the extractor that
            --features names. None: the metric needs only pixels or the model.
        suits: takes the training images and the model (or None). Returns True if the metric is computed by default.
        hub_names: names of scores on the Hub. The keys are the ids of the scores up to their first digit:
            {"is": "inception_score"} for is50k.
        words: descriptions of the scores for model cards. The keys are the beginnings of the ids.

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


def _photos(train, model) -> bool:
    return not is_digits(train) and train.channels in (1, 3)


CLOSENESS = {
    "precision": "precision: share of images close to a real image",
    "recall": "recall: share of real images close to a generated image",
    "density": "density: how many real images are close to a generated image",
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
    "memorization_median": "distance to training images, divided by the distance of held-out images to them",
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
    "fd_mnist": Metric(classifier_scores, "digits", lambda train, model: is_digits(train), words=CLASSIFIED),
    "fd_cifar10": Metric(classifier_scores, "cifar10", lambda train, model: is_cifar10(train), words=CLASSIFIED),
    "bits_per_dim": Metric(
        bits_per_dim, None, lambda train, model: model is not None, words={"bits_per_dim": "bits per dimension"}
    ),
    "memorization": Metric(memorization, None, lambda train, model: True, words=COPIES),
}


def in_words(id: str) -> str | None:
    """Return the description of the score with this id, or None if METRICS has no words for it."""
    words = {start: words for metric in METRICS.values() for start, words in metric.words.items()}
    start = next((start for start in words if re.match(rf"{re.escape(start)}(?![a-z])", id)), None)
    return None if start is None else words[start] + (", to held-out images" if "_test" in id else "")
