"""Rows of an evaluation on several devices: each one counts once, and all devices have as many batches.

Lightning repeats the first rows where their number is no multiple of the number of devices, and they count twice. A
device without the row could not take part in what all devices do together in a batch, as FSDP2 does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, Sampler, SequentialSampler
from typing_extensions import override


def each_once(rows: Any, num_devices: int, device: int) -> tuple[Any, Sampler[Any]]:
    """The dataset and the sampler of a loader that gives this device its share of ``rows``, in their order.

    A device that has a row less than others gets a row of weight 0 at its end.

    Args:
        rows: The dataset: mappings with a ``weight``, tuples of those, or data classes with one.
        num_devices: Number of devices that share the rows.
        device: Index of this device.
    """
    if num_devices == 1:
        return rows, SequentialSampler(rows)
    return _WithStandIn(rows), EachOnce(rows, num_devices, device)


class EachOnce(DistributedSampler[Any]):
    """Hands out the rows of this device, and None in place of one that only other devices have.

    Args:
        rows: The dataset.
        num_devices: Number of devices that share the rows.
        device: Index of this device.
    """

    def __init__(self, rows: Any, num_devices: int, device: int) -> None:
        # Lightning keeps a sampler of this class as it is.
        super().__init__(rows, num_devices, device, shuffle=False)
        self.total_size = len(rows)  # no row is repeated

    @override
    def __iter__(self) -> Iterator[Any]:
        """Iterate over the places of the rows."""
        own = range(self.rank, self.total_size, self.num_replicas)
        return iter([*own, *[None] * (self.num_samples - len(own))])


class _WithStandIn(Dataset[Any]):
    """Rows, and under None a row that counts nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, place: Any) -> Any:
        return _without_weight(self.rows[0]) if place is None else self.rows[place]


def _without_weight(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {**row, "weight": 0.0}
    return tuple(map(_without_weight, row)) if isinstance(row, tuple) else dataclasses.replace(row, weight=0.0)
