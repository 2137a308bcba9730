"""The extractors by name: networks that turn images into features, which the scores compare."""

from functools import partial

from accelerate import PartialState

from ..errors import UserError, no_such
from .cifar10_classifier import Cifar10Classifier
from .digit_classifier import DigitClassifier
from .dinov2 import load_dinov2
from .features import Extractor
from .inception import load_inception
from .small_classifier import load_weights


CLASSIFIERS = {kind.name: kind for kind in (DigitClassifier, Cifar10Classifier)}  # train_classifier.py trains these
EXTRACTORS = {"inception": load_inception, "dinov2": load_dinov2}
EXTRACTORS |= {name: partial(load_weights, kind) for name, kind in CLASSIFIERS.items()}


def load_extractor(name: str, **options) -> Extractor:
    """Return an extractor on the device of this process. `options` are arguments of its loader, e.g. `weights`.

    Raises:
        MissingWeights: if the weights are not on this machine and cannot be downloaded.
        UserError: for a name that is not in `EXTRACTORS`, or a file without weights of this extractor.
    """
    if name not in EXTRACTORS:
        raise UserError(no_such("extractor of features", name, EXTRACTORS))
    return EXTRACTORS[name](**options).to(PartialState().device)


def extractor_id(extractor: Extractor) -> str:
    """Return `name-pipeline-sha8`. Scores are comparable only if their extractors have the same id."""
    return f"{extractor.name}-{extractor.pipeline}-{extractor.sha256[:8]}"
