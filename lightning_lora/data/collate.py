"""Rows of different lengths to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position without loss, as ``torch.nn.functional.cross_entropy`` has it."""


@dataclass(frozen=True)
class Collate:
    """Pads on the right to the longest row of the batch.

    Args:
        pad_id: Token id that fills ``input_ids``; masked out everywhere, so any valid id will do.

    Shape:
        - ``input_ids``, ``attention_mask``, ``labels``: ``(rows, longest)``, int64. ``labels`` repeats the ids of the
          trained tokens and is -100 elsewhere; it is not shifted.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of rows with ``input_ids`` and ``supervised``."""
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids, supervised = torch.tensor(row["input_ids"]), torch.tensor(row["supervised"])
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, : len(ids)] = torch.where(supervised, ids, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
