"""Training rows filled with examples: which share a row, in what order, and on which device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from lightning_lora.data.batches.bins import best_fit
from lightning_lora.data.batches.collate import Example
from lightning_lora.data.sampling.mixture import Mixture

Pack = tuple[int, ...]
"""Indices of the examples that share one row."""


class PackedRows(Dataset[list[Example]]):
    """A dataset of packs instead of single examples.

    Args:
        rows: The dataset of `Example`s.
        lengths: Tokens of each example, ``(rows,)``; with a mixture, those of the examples of an epoch.
        capacity: Most tokens in a pack.
        seed: Decides which examples share a pack.
        mixture: Chooses the examples of each epoch; None takes all.

    Attributes:
        packs: The packs. In each epoch, `PackSampler` exchanges examples of equal length among them.
    """

    def __init__(
        self, rows: Any, lengths: numpy.ndarray, capacity: int, seed: int, mixture: Mixture | None = None
    ) -> None:
        self.rows = rows
        self.mixture = mixture
        self.lengths = lengths
        order = numpy.random.default_rng(seed).permutation(len(lengths))
        packs = best_fit(lengths[order].tolist(), capacity)
        self.packs: list[Pack] = [tuple(order[pack].tolist()) for pack in packs]

    def examples(self, epoch: int) -> numpy.ndarray:
        """The rows of an epoch, in the order of ``lengths``."""
        return numpy.arange(len(self.lengths)) if self.mixture is None else self.mixture.rows(epoch)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, pack: Pack | int) -> list[Example]:
        """The examples of a pack, which is given by its indices or by its number."""
        if isinstance(pack, int):
            pack = tuple(self.examples(0)[list(self.packs[pack])].tolist())
        return [self.rows[row] for row in pack]


class PackSampler(DistributedSampler[Any]):
    """Shuffles the packs in each epoch and distributes them over the devices.

    In each epoch, examples of equal length change places and the packs are shuffled. Every example of an epoch occurs
    once in it. All epochs and devices have the same number of packs, as Lightning computes the number of steps only
    once: if the number of packs is not a multiple of the number of devices, empty packs are added and none is repeated.

    Args:
        packed: The packs.
        seed: Decides the order, together with the epoch.
        num_replicas: Number of devices that share the packs.
        rank: Index of this device.
    """

    def __init__(self, packed: PackedRows, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(packed, num_replicas, rank, seed=seed)
        self.packed = packed

    @override
    def __iter__(self) -> Iterator[Pack]:
        """Iterate over the packs of this device in the current epoch."""
        generator = numpy.random.default_rng([self.seed, self.epoch])
        exchanged = self.packed.examples(self.epoch)[_exchange(self.packed.lengths, generator)]
        order = generator.permutation(len(self.packed))
        packs = [tuple(exchanged[list(self.packed.packs[pack])].tolist()) for pack in order]
        packs += [()] * (self.total_size - len(packs))
        return iter(packs[self.rank : self.total_size : self.num_replicas])


def _exchange(lengths: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """A random permutation of the examples that maps each one to an example of the same length."""
    shuffled = generator.permutation(len(lengths))
    permutation = numpy.empty(len(lengths), dtype=numpy.int64)
    permutation[numpy.argsort(lengths, kind="stable")] = shuffled[numpy.argsort(lengths[shuffled], kind="stable")]
    return permutation
