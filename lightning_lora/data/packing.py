"""Training rows filled with examples: which go together in an epoch, in what order, and on which device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from .bins import best_fit
from .collate import Row

Pack = tuple[int, ...]
"""Indices of the rows that share one packed row."""


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


def _exchanged(lengths: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """For each row one of the same length, drawn at random, each once."""
    shuffled = generator.permutation(len(lengths))
    places = numpy.empty(len(lengths), dtype=numpy.int64)
    places[numpy.argsort(lengths, kind="stable")] = shuffled[numpy.argsort(lengths[shuffled], kind="stable")]
    return places
