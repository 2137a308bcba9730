"""The classes of a network: their names, their numbers, and which embedding means "no class"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Classes:
    """The classes of a network. For an unconditional network this is `Classes()`, which is empty and therefore falsy.

    Attributes:
        names: the name of class k at index k. None if the model stores no names, so that its classes have only
            numbers.
        num_embeddings: how many class embeddings the network has. If there is one more embedding than names, the last
            embedding means "no class".

    Example:
        >>> classes = Classes(("cat", "dog"), num_embeddings=3)
        >>> len(classes), classes.no_class, classes.number("dog"), classes.in_turn([0, 1, 2])
        (2, 2, 1, [0, 1, 0])
    """

    names: tuple[str, ...] | None = None
    num_embeddings: int = 0

    @classmethod
    def of_model(cls, num_embeddings: int | None, id2label: dict | None) -> Classes:
        """Return the classes of a saved network.

        Args:
            num_embeddings: the UNet's `num_class_embeds`. None or 0 gives `Classes()`.
            id2label: the class names that model_index.json stores, by number.
        """
        if not num_embeddings:
            return cls()
        names = tuple(id2label[number] for number in sorted(id2label, key=int)) if id2label else None
        return cls(names, num_embeddings)

    @classmethod
    def of_run(cls, config, names: Sequence[str] | None) -> Classes:
        """Return the classes of the UNet that a run trains. With --label_dropout, it also has an embedding "no class".

        Args:
            names: the classes of the data.
        """
        return cls(tuple(names), len(names) + (config.label_dropout > 0)) if config.class_conditional else cls()

    def __len__(self) -> int:
        """Return how many classes can be requested, not counting "no class"."""
        return len(self.names) if self.names else self.num_embeddings

    @property
    def no_class(self) -> int | None:
        """The number of the embedding "no class", for classifier-free guidance. None if this embedding is missing."""
        return len(self) if self.num_embeddings > len(self) else None

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names as model_index.json stores them: {0: "cat", ...}, or None."""
        return dict(enumerate(self.names)) if self.names else None

    def number(self, label: int | str) -> int:
        """Return the number of a class. `label` is its name, or its number as an int or as text.

        Raises:
            UserError: for a label that is not one of these classes.
        """
        known = list(self.names or map(str, range(len(self))))
        if label in known:
            return known.index(label)
        if re.fullmatch("[0-9]{1,9}", str(label)) and int(label) < len(self):
            return int(label)
        if not known:
            raise UserError(
                "this model has no classes: leave --class_labels out, or give a --classifier to guide the model."
            )
        raise UserError(
            f"--class_labels has {label!r}, but the classes of this model are {', '.join(known)}: give names or "
            "numbers of these classes."
        )

    def numbers(self, labels: int | str | Iterable[int | str] | None) -> list[int] | None:
        """Return the numbers of the requested classes. `labels` is one name or number, or several.

        If `labels` is None, return the numbers of all classes, or None if there are no classes.

        Raises:
            UserError: for a label that is not one of these classes.
        """
        if labels is None:
            return list(range(len(self))) or None
        labels = labels.tolist() if hasattr(labels, "tolist") else labels  # of a tensor or an array
        labels = [labels] if isinstance(labels, (int, str)) else list(labels)
        if not labels:
            raise UserError("--class_labels is empty: give names or numbers of classes, or leave it out.")
        return [self.number(label) for label in labels]

    def in_turn(self, indices: Sequence[int]) -> list[int] | None:
        """Return a class for each image index, taking all classes in turn. None for an unconditional network."""
        return [index % len(self) for index in indices] if self else None
