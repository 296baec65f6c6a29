"""Several examples in one row of at most so many tokens: which go together, and in what order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from .collate import Row

Pack = tuple[int, ...]
"""Indices of the rows that share one packed row."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each row, in the order given, into the fullest pack that still has room for it, else into a new one.

    Taking rows as they come rather than the longest first keeps rows of all lengths together, so that no optimizer
    step sees long rows only; with the usual lengths far below ``capacity`` it fills packs nearly as well.

    Args:
        lengths: Tokens of each row, at most ``capacity``.
        capacity: Tokens of a pack.

    >>> best_fit([5, 6, 4, 2, 3], capacity=10)
    [[0, 3, 4], [1, 2]]
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: tokens left in a pack, and which
    for row, length in enumerate(lengths):
        fitting = bisect_left(room, (length, -1))
        left, pack = room.pop(fitting) if fitting < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        insort(room, (left - length, pack))
    return packs


class PackedRows(Dataset[list[Row]]):
    """The rows of a split, taken a pack at a time.

    Args:
        rows: A dataset of `Row`s.
        lengths: Tokens of each.
        capacity: Tokens of a pack at most.
        seed: Decides which rows go together.

    Attributes:
        packs: The packs of an epoch; others have the same with rows of equal length in each other's places.
    """

    def __init__(self, rows: Any, lengths: numpy.ndarray, capacity: int, seed: int) -> None:
        self.rows = rows
        self.lengths = lengths
        order = numpy.random.default_rng(seed).permutation(len(lengths))
        packs = best_fit(lengths[order].tolist(), capacity)
        self.packs: list[Pack] = [tuple(order[pack].tolist()) for pack in packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, pack: Pack | int) -> list[Row]:
        """The rows of a pack, or of the pack with this number."""
        return [self.rows[row] for row in (self.packs[pack] if isinstance(pack, int) else pack)]


class PackSampler(DistributedSampler[Any]):
    """The packs of each epoch in an order of its own, shared out to the devices.

    Every row is in one pack of one device, and every epoch and device has the same number of packs, as Lightning counts
    steps once: in each epoch, rows of equal length change places and packs are shuffled, and where the number of
    devices does not divide that of packs, the last ones are empty rather than repeated.

    Args:
        packed: The packs.
        seed: Decides the order, together with the epoch.
        num_replicas: Devices that share the packs.
        rank: Which of them this is.
    """

    def __init__(self, packed: PackedRows, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(packed, num_replicas, rank, seed=seed)
        self.packed = packed

    @override
    def __iter__(self) -> Iterator[Pack]:
        """This device's packs of the epoch."""
        generator = numpy.random.default_rng([self.seed, self.epoch])
        places = _exchanged(self.packed.lengths, generator)
        order = generator.permutation(len(self.packed))
        packs = [tuple(places[list(self.packed.packs[pack])].tolist()) for pack in order]
        packs += [()] * (self.total_size - len(packs))
        return iter(packs[self.rank : self.total_size : self.num_replicas])


def filled(lengths: numpy.ndarray, batch_size: int) -> float:
    """Share of the places that hold tokens when each batch is padded to its longest row.

    Args:
        lengths: Tokens of the rows, in the order of the batches.
        batch_size: Rows of a batch.

    >>> filled(numpy.array([1, 4, 5]), batch_size=2)
    0.7692307692307693
    """
    places = sum(len(batch) * max(batch) for batch in _batches(lengths.tolist(), batch_size))
    return int(lengths.sum()) / places


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    return (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))


def _exchanged(lengths: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """For each row one of the same length, drawn at random, each once."""
    shuffled = generator.permutation(len(lengths))
    places = numpy.empty(len(lengths), dtype=numpy.int64)
    places[numpy.argsort(lengths, kind="stable")] = shuffled[numpy.argsort(lengths[shuffled], kind="stable")]
    return places
