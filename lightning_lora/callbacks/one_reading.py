"""Numbers on the device that callbacks need, read together: the host waits for the device once in an optimizer step."""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class OneReading:
    """What callbacks ask of the device. The first that must know an answer reads all of them in one transfer.

    `FiniteGradients` must know before each optimizer step. A callback that asks before costs no wait of its own.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Tensor] = {}
        self._read: dict[str, list[float]] = {}

    def ask(self, name: str, numbers: Tensor) -> None:
        """Ask for numbers, of any shape and type, in place of those asked for before by this name."""
        self._read.pop(name, None)
        self._asked[name] = numbers.detach().flatten()

    def take(self, name: str) -> list[float] | None:
        """The numbers asked for by this name, once; None if there are none. Waits unless they were read already."""
        if name in self._asked:
            self._read_all()
        return self._read.pop(name, None)

    def drop(self, name: str) -> None:
        """Ask no longer."""
        self._asked.pop(name, None)
        self._read.pop(name, None)

    def _read_all(self) -> None:
        by_device: dict[torch.device, list[str]] = defaultdict(list)
        for name, numbers in self._asked.items():
            by_device[numbers.device].append(name)
        for device, names in by_device.items():
            # float64 holds counts of tokens too; an Apple GPU has none.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            values = torch.cat([self._asked[name].to(dtype) for name in names]).tolist()
            for name in names:
                count = len(self._asked.pop(name))
                self._read[name], values = values[:count], values[count:]


_OF_TRAINERS: WeakKeyDictionary[Trainer, OneReading] = WeakKeyDictionary()


def reading_of(trainer: Trainer) -> OneReading:
    """The readings of a Trainer, which its callbacks share."""
    return _OF_TRAINERS.setdefault(trainer, OneReading())
