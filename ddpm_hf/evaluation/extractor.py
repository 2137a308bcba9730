"""The extractors by name: networks that turn images into features, which the scores compare."""

from accelerate import PartialState

from ..errors import UserError, no_such
from .cifar10_classifier import Cifar10Classifier, load_cifar10_classifier
from .digit_classifier import DigitClassifier, load_digit_classifier
from .dinov2 import load_dinov2
from .features import Extractor
from .inception import load_inception


EXTRACTORS = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "digits": load_digit_classifier,
    "cifar10": load_cifar10_classifier,
}
CLASSIFIERS = {kind.name: kind for kind in (DigitClassifier, Cifar10Classifier)}  # train_classifier.py trains these


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
