"""Collators: examples of different lengths to one batch, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lora.batch_facts import FACTS, BatchFacts
from lightning_lora.data.batches.bins import even_rows

Example = dict[str, Any]
"""The ``input_ids`` and the ``supervised`` mask of one row of a dataset, and its ``weight`` if rows have weights."""

IGNORE_INDEX = -100
"""Label of a position without loss, the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Collate:
    """Pads each example on the right to the longest one of the batch.

    Args:
        pad_id: Token id that fills ``input_ids``. It is masked everywhere, so any valid id will do.
        weighted: Whether examples have a ``weight``.

    Shape:
        - ``input_ids``, ``attention_mask``, ``labels``: ``(rows, longest)``, int64. ``labels`` holds the ids of the
          supervised tokens and -100 elsewhere; it is not shifted.
        - ``weights``: ``(rows, longest)``, float32, the weight of the example of each token, if ``weighted``.
        - ``facts``: the `BatchFacts` of the labels.
    """

    pad_id: int
    weighted: bool = False

    def __call__(self, rows: Sequence[Example]) -> dict[str, Any]:
        """Make a batch with one example in each row."""
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids, supervised = torch.tensor(row["input_ids"]), torch.tensor(row["supervised"])
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, : len(ids)] = torch.where(supervised, ids, IGNORE_INDEX)
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch[FACTS] = BatchFacts.of(labels, None, IGNORE_INDEX)
        if self.weighted:
            batch["weights"] = torch.tensor([float(row["weight"]) for row in rows])[:, None].repeat(1, shape[1])
        return batch


@dataclass(frozen=True)
class CollatePacked:
    """Concatenates the examples of each pack to one row, and pads each row to the longest one.

    Padding is a separate example without labels. There is no ``attention_mask``: transformers reads the boundaries of
    examples off ``position_ids`` only without one. The first token of an example is never supervised, so it is not
    predicted from the example before it.

    Args:
        pad_id: Token id that fills ``input_ids``; any valid id will do.
        weighted: Whether examples have a ``weight``.

    Shape:
        - ``input_ids``, ``labels``, ``position_ids``: ``(packs, longest)``, int64. ``position_ids`` starts at 0 with
          each example; ``labels`` holds the ids of the supervised tokens and -100 elsewhere; it is not shifted.
        - ``weights``: ``(packs, longest)``, float32, the weight of the example of each token, if ``weighted``.
        - ``facts``: the `BatchFacts` of the labels.
    """

    pad_id: int
    weighted: bool = False

    def __call__(self, packs: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """Make a batch with one pack in each row; an empty pack becomes a row of padding."""
        used = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
        shape = len(packs), max([*used, 1])
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        weights = torch.ones(shape)
        for index, pack in enumerate(packs):
            start = 0
            for row in pack:
                ids, supervised = torch.tensor(row["input_ids"]), torch.tensor(row["supervised"])
                place = slice(start, start := start + len(ids))
                input_ids[index, place] = ids
                labels[index, place] = torch.where(supervised, ids, IGNORE_INDEX)
                position_ids[index, place] = torch.arange(len(ids))
                if self.weighted:
                    weights[index, place] = float(row["weight"])
            position_ids[index, start:] = torch.arange(shape[1] - start)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        batch[FACTS] = BatchFacts.of(labels, position_ids, IGNORE_INDEX)
        return batch | {"weights": weights} if self.weighted else batch


@dataclass(frozen=True)
class CollateEvenly:
    """Packs the examples of a batch into a few rows of nearly equal length, as `even_rows` assigns them.

    Args:
        pad_id: Token id that fills ``input_ids``; any valid id will do.
        weighted: Whether examples have a ``weight``.
    """

    pad_id: int
    weighted: bool = False

    def __call__(self, rows: Sequence[Example]) -> dict[str, Any]:
        """Make a batch with several examples in each row."""
        packs = even_rows([len(row["input_ids"]) for row in rows])
        return CollatePacked(self.pad_id, self.weighted)([[rows[index] for index in pack] for pack in packs])
