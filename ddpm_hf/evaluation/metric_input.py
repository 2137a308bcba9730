"""Define Look, the input of a metric, and the functions for floors that several metrics use."""

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
            n_gen, n_ref: the numbers of generated and of real images that the value was computed from. If `n_gen` is
                None, it is the number of all generated images.
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
        """The number of generated images as ids contain it, e.g. 50k."""
        return format_count(len(self.images))


def has_floor(evaluation) -> bool:
    """Return True if at least FEWEST images are held out. Then floors are computed from these images."""
    return evaluation.held_out is not None and len(evaluation.held_out) >= FEWEST


def random_rows(rows: Tensor, n: int) -> Tensor:
    """Return n random rows of `rows` (N, d), or all if N < n.

    The first n rows would be a biased choice, because real images are often sorted by class.
    """
    return rows[torch.randperm(len(rows), generator=keyed_generator(0, "floor"))[:n]]


def format_count(n: int) -> str:
    """Return a number of images as ids contain it: 50k, 2k, 2048."""
    return f"{n // 1000}k" if n % 1000 == 0 and n else str(n)
