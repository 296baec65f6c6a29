"""Rows of pairs to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_lora.batch_facts import FACTS
from lightning_lora.data.batches.collate import Collate, Example

PairOfRows = tuple[Example, Example]
"""The chosen and the rejected row of a pair."""


class Pairs(TorchDataset[PairOfRows]):
    """The pairs of a dataset in which the rows of a pair follow each other, the chosen one first.

    Args:
        rows: Rows of tokens.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows) // 2

    @override
    def __getitem__(self, index: Any) -> PairOfRows:
        """The rows of a pair."""
        return self.rows[2 * int(index)], self.rows[2 * int(index) + 1]


@dataclass(frozen=True)
class CollatePairs:
    """Pads both rows of each pair on the right to the longest row of the batch.

    Args:
        pad_id: Token id that fills ``input_ids``; any valid id will do.
        weighted: Whether pairs have a ``weight``.
        margins: Whether pairs have a ``margin``.

    Shape:
        - ``input_ids``, ``attention_mask``, ``labels``: ``(pairs, 2, longest)``, int64; the chosen row of a pair is
          first. ``labels`` holds the ids of the answers and -100 elsewhere; it is not shifted.
        - ``weights``, ``margin``: ``(pairs,)``, float32, if there are any.
        - ``facts``: the `BatchFacts` of the labels, of all rows.
    """

    pad_id: int
    weighted: bool = False
    margins: bool = False

    def __call__(self, pairs: Sequence[PairOfRows]) -> dict[str, Any]:
        """Make a batch with one pair in each row."""
        flat = Collate(self.pad_id)([row for pair in pairs for row in pair])
        facts = flat.pop(FACTS)
        batch = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in flat.items()} | {FACTS: facts}
        if self.weighted:
            batch["weights"] = torch.tensor([float(chosen["weight"]) for chosen, _ in pairs])
        if self.margins:
            batch["margin"] = torch.tensor([float(chosen["margin"]) for chosen, _ in pairs])
        return batch
