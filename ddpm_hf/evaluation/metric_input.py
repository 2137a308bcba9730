"""Define Look, the input of a metric, and functions that several metrics use."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..randomness import keyed_generator
from .extractor import extractor_id
from .features import Features
from .reference import Reference


FEWEST = 40  # images, because a standard error is estimated from 20 blocks of at least 2 images


@dataclass(frozen=True)
class Look:
    """The input of a metric. The last four attributes are None for a metric without an extractor.

    `look.entry(id, value, lower_is_better=..., se=..., floor=...)` makes an entry for the record.

    Attributes:
        evaluation: `evaluation.train` and `evaluation.held_out` are the real images. Their method `get(indices)`
            returns float32 images (B, C, H, W) in [-1, 1]. `evaluation.model` is the model, as `load` returns it.
        images: the generated images, uint8 (N, C, H, W).
        extractor: the network that extracted the features.
        generated: the features of the generated images.
        train: a `Reference`: the statistics and features of the training images.
        held_out: the same for the held-out images. None if fewer than 40 images are held out.
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
            se: the standard error of the value.
            se_method: a few words on how the standard error was computed.
            floor: the value that held-out real images have.
            n_gen: the number of generated images behind the value. None: all of them.
            n_ref: the number of real images behind the value.
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
        """The number of generated images as text for ids, e.g. 50k for 50,000."""
        return format_count(len(self.images))


def has_floor(evaluation) -> bool:
    """Return True if at least FEWEST images are held out, so that floors can be computed."""
    return evaluation.held_out is not None and len(evaluation.held_out) >= FEWEST


def random_rows(rows: Tensor, n: int) -> Tensor:
    """Return n random rows of `rows` (N, d), or all if N < n.

    The first n rows would be a biased choice, because real images are often sorted by class.
    """
    return rows[torch.randperm(len(rows), generator=keyed_generator(0, "floor"))[:n]]


def format_count(n: int) -> str:
    """Return a number of images as text for ids: 50k for 50,000, and 2048 for 2,048."""
    return f"{n // 1000}k" if n % 1000 == 0 and n else str(n)
