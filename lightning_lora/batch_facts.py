"""What the host knows of a batch of tokens from making it, so that a step need not ask the device for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

FACTS = "facts"
"""Key of the `BatchFacts` in a batch."""


class BatchFacts:
    """Where the supervised tokens of a batch are. Whoever changes the labels of a batch must drop its facts.

    Tensors of a batch live on the device, and a number or shape that depends on their values can only be had by
    waiting for it. A `Trainer` moves the facts with the batch.

    Args:
        places: Indices ``(n,)`` into the flattened ``(rows, tokens)`` of the positions whose next token has a label.
        size: Number of positions, ``rows * tokens``.
        labels: Smallest and largest label among them; ``(0, 0)`` without one.
        packed: Whether a row holds several examples, padding included.
    """

    def __init__(self, places: Tensor, size: int, labels: tuple[int, int], packed: bool) -> None:
        self.places = places
        self.size = size
        self.labels = labels
        self.packed = packed

    @classmethod
    def of(cls, labels: Tensor, position_ids: Tensor | None, ignored: int) -> Self:
        """Find the facts of a batch on the host.

        Args:
            labels: ``(rows, tokens)``, not shifted.
            position_ids: ``(rows, tokens)``, which start again with each example of a row; None: a row is an example.
            ignored: The label of a token without a loss.
        """
        following = torch.full_like(labels, ignored)
        following[:, :-1] = labels[:, 1:]
        packed = False
        if position_ids is not None:
            ends = position_ids.diff() != 1
            following[:, :-1][ends] = ignored
            packed = bool(ends.any())
        flat = following.flatten()
        (places,) = (flat != ignored).nonzero(as_tuple=True)
        found = flat[places]
        labels_found = (int(found.min()), int(found.max())) if len(found) else (0, 0)
        return cls(places, labels.numel(), labels_found, packed)

    @property
    def count(self) -> int:
        """Number of supervised tokens that are predicted."""
        return self.places.shape[0]

    def fit(self, labels: Tensor) -> bool:
        """Whether these are facts of a batch with such labels: not of other rows, on another device, or of a trace."""
        places = self.places
        return self.size == labels.numel() and places.device == labels.device and type(places) is type(labels)

    def joined(self) -> Self:
        """The same for all rows one after another in one row."""
        return type(self)(self.places, self.size, self.labels, packed=True)

    def to(self, device: torch.device | str) -> Self:
        """The same with ``places`` on a device."""
        return type(self)(self.places.to(device, non_blocking=True), self.size, self.labels, self.packed)

    def pin_memory(self) -> Self:
        """The same with ``places`` in pinned memory, for a loader with ``pin_memory``."""
        return type(self)(self.places.pin_memory(), self.size, self.labels, self.packed)


def facts_of(batch: Any) -> BatchFacts | None:
    """The facts that a batch brings of its labels; None if it brings none, or those of other rows."""
    facts, labels = (batch.get(FACTS), batch.get("labels")) if isinstance(batch, Mapping) else (None, None)
    return facts if isinstance(facts, BatchFacts) and isinstance(labels, Tensor) and facts.fit(labels) else None
