"""The shapes of the batches of a run, and the operations that each takes."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_lora.batch.counting import count_rows
from lightning_lora.data import SFTDataModule
from lightning_lora.data.split import row_lengths

_BATCHES, _SECONDS = 200, 1.0
"""Most batches, and most seconds, for which a loader is read."""


class Shape(NamedTuple):
    """The shape of a batch.

    Args:
        rows: Its rows.
        length: Tokens of the longest of them; 1 where rows are no tokens.
    """

    rows: int
    length: int


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a batch, by its shape.

    Args:
        linear: Operations of a position.
        attention: Operations of a position for each position of its row.
    """

    linear: float
    attention: float

    @classmethod
    def of(cls, flops: float, attention_flops: float, shape: Shape) -> Work:
        """The operations of other batches, from those of one."""
        positions = shape.rows * shape.length
        return cls((flops - attention_flops) / positions, attention_flops / (positions * shape.length))

    def __call__(self, shape: Shape) -> float:
        """The operations of a batch of this shape."""
        return shape.rows * shape.length * (self.linear + self.attention * shape.length)

    def mean(self, shapes: Iterable[Shape]) -> float:
        """The mean of several batches."""
        return statistics.fmean(map(self, shapes))


def shape_of(batch: Any) -> Shape:
    """The shape of a batch as a loader makes it."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(tokens, Tensor) and tokens.dim() == 2:
        return Shape(*tokens.shape)
    return Shape(count_rows(batch), 1)


def training_shapes(data: LightningDataModule, rows: int | None = None) -> list[Shape]:
    """The shapes of the training batches of an epoch, or of many of them where loading all would take long.

    Args:
        rows: Rows of a batch; None takes the data module's own.
    """
    twin = with_rows(copy.copy(data), rows)
    if isinstance(twin, SFTDataModule) and "train" in twin.rows and not twin.packing:
        lengths = row_lengths(twin.rows["train"], twin.max_length)
        if twin.shares is None:
            return _divided(lengths[list(twin._sampler(1, 0))], twin.batch_size)
    return list(_read(twin.train_dataloader()))


@dataclass(frozen=True)
class Validation:
    """One pass over the validation rows.

    Args:
        batches: Its batches.
        shapes: The shapes of many of them.
    """

    batches: int
    shapes: Sequence[Shape]

    @classmethod
    def of(cls, data: LightningDataModule, rows: int | None = None, limit: float | int | None = None) -> Validation:
        """The validation of a data module that is set up.

        Args:
            rows: Rows of a batch; None takes the data module's own.
            limit: ``limit_val_batches`` of the Trainer, for each loader.
        """
        if not is_overridden("val_dataloader", data, LightningDataModule):
            return cls(0, ())
        twin = with_rows(copy.copy(data), rows)
        found = twin.val_dataloader()
        batches, shapes = 0, []
        for loader in found if isinstance(found, (list, tuple)) else [found]:
            count = len(loader)
            count = int(count * limit) if isinstance(limit, float) else count if limit is None else min(count, limit)
            batches += count
            if isinstance(twin, SFTDataModule):
                lengths = row_lengths(twin.rows["validation"], twin.max_length)
                shapes += _divided(lengths, twin.batch_size)[:count]
            else:
                shapes += list(itertools.islice(_read(loader), count))
        return cls(batches, shapes)


def with_rows(data: LightningDataModule, rows: int | None) -> LightningDataModule:
    """The data module, made to give batches of so many rows if it can."""
    if rows is not None and isinstance(getattr(data, "batch_size", None), int):
        data.batch_size = rows  # pyright: ignore[reportAttributeAccessIssue]
    return data


def _divided(lengths: numpy.ndarray, rows: int) -> list[Shape]:
    parts = (lengths[start : start + rows] for start in range(0, len(lengths), rows))
    return [Shape(len(part), int(part.max())) for part in parts]


def _read(loader: Any) -> Iterator[Shape]:
    begun = time.perf_counter()
    for number, batch in enumerate(loader):
        if number >= _BATCHES or time.perf_counter() - begun > _SECONDS:
            return
        yield shape_of(batch)
