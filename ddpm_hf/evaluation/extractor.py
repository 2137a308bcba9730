"""The networks that scores look through, by name."""

from accelerate import PartialState
from torch import nn

from ..errors import UserError
from .digit_classifier import load_digit_classifier
from .dinov2 import load_dinov2
from .inception import load_inception


EXTRACTORS = {"inception": load_inception, "dinov2": load_dinov2, "digits": load_digit_classifier}


def load_extractor(name: str, **options) -> nn.Module:
    """Load an extractor onto this process's device; `options` are those of its loader (weights, pipeline, source).

    Raises:
        MissingWeights: if its weights cannot be had here.
        UserError: for a name that is none of `EXTRACTORS`, or a file that holds something else.
    """
    if name not in EXTRACTORS:
        raise UserError(f"there are no features named {name!r}: choose from {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](**options).to(PartialState().device)


def extractor_id(extractor: nn.Module) -> str:
    """Return `name-pipeline-sha8`, which names what numbers depend on; numbers of two ids are not to be compared."""
    return f"{extractor.name}-{extractor.pipeline}-{extractor.sha256[:8]}"
