"""Examples of different lengths to one batch: one in a row, or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bins import even_rows

Row = dict[str, Any]
"""``input_ids`` and ``supervised`` of one example."""

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

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch of rows."""
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


@dataclass(frozen=True)
class CollatePacked:
    """Lays the examples of each pack one behind the other in one row, and pads to the longest row.

    Padding is an example of its own without labels. There is no ``attention_mask``: transformers looks for examples in
    ``position_ids`` only when none is given. Nothing predicts the first token of an example, as it is never supervised.

    Args:
        pad_id: Token id that fills ``input_ids``; any valid id will do.

    Shape:
        - ``input_ids``, ``labels``, ``position_ids``: ``(packs, longest)``, int64. ``position_ids`` starts at 0 with
          each example; ``labels`` repeats the ids of the trained tokens and is -100 elsewhere; it is not shifted.
    """

    pad_id: int

    def __call__(self, packs: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
        """Make a batch of packs; one without examples becomes a row of padding."""
        used = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
        shape = len(packs), max([*used, 1])
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for index, pack in enumerate(packs):
            start = 0
            for row in pack:
                ids, supervised = torch.tensor(row["input_ids"]), torch.tensor(row["supervised"])
                place = slice(start, start := start + len(ids))
                input_ids[index, place] = ids
                labels[index, place] = torch.where(supervised, ids, IGNORED)
                position_ids[index, place] = torch.arange(len(ids))
            position_ids[index, start:] = torch.arange(shape[1] - start)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


@dataclass(frozen=True)
class CollateEvenly:
    """Lays the examples of a batch in few rows of nearly the same length: `CollatePacked` of `even_rows`.

    Args:
        pad_id: Token id that fills ``input_ids``; any valid id will do.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch of examples."""
        packs = even_rows([len(row["input_ids"]) for row in rows])
        return CollatePacked(self.pad_id)([[rows[index] for index in pack] for pack in packs])
