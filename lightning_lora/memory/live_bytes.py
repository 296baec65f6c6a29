"""The bytes of the storages that are alive, by what they are for, and how they were divided at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

KINDS: tuple[str, ...] = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")
Segment = tuple[str, ...]
"""The name of a part of a step."""


class LiveBytes:
    """Counts each storage once, from the moment it is added until nothing holds it.

    Attributes:
        held: Bytes alive now, by kind.
        segment: The part of a step that runs now.
        peaks: The largest sum in each segment so far, by kind at that moment.
    """

    def __init__(self) -> None:
        self.held: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.segment: Segment = ("",)
        self.peaks: dict[Segment, dict[str, int]] = {}
        self._total = 0
        self._highest: dict[Segment, int] = {}
        # Key of a storage to its kind, its bytes, and the reference that tells of its end.
        self._storages: dict[int, tuple[str, int, Any]] = {}

    def add(self, tensor: Tensor, kind: str) -> None:
        """Count the storage of ``tensor`` unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        num_bytes = storage.nbytes()
        if known is not None:
            if num_bytes != known[1]:  # resized in place
                self._storages[key] = (known[0], num_bytes, known[2])
                self._change(known[0], num_bytes - known[1])
            return
        self._storages[key] = (kind, num_bytes, weakref.ref(storage, lambda _: self._end(key)))
        self._change(kind, num_bytes)

    def move(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of ``tensors`` as another kind from now on."""
        for tensor in tensors:
            self.add(tensor, kind)
            key = tensor.untyped_storage()._cdata
            before, num_bytes, reference = self._storages[key]
            self._storages[key] = (kind, num_bytes, reference)
            self.held[before] -= num_bytes
            self.held[kind] += num_bytes

    def move_all(self, kind: str) -> None:
        """Count everything that is alive as one kind."""
        self._storages = {key: (kind, size, reference) for key, (_, size, reference) in self._storages.items()}
        self.held = dict.fromkeys(KINDS, 0) | {kind: self._total}

    def for_a_moment(self, num_bytes: int) -> None:
        """Count temporaries inside an operation, which are gone when it returns."""
        self._change("activations", num_bytes)
        self._change("activations", -num_bytes)

    def begin(self, segment: Segment) -> None:
        """Go on in this segment, which may have run before."""
        self.segment = segment
        self._change("activations", 0)

    def start_again(self) -> None:
        """Forget the peaks so far."""
        self.peaks, self._highest = {}, {}

    def _end(self, key: int) -> None:
        kind, num_bytes, _ = self._storages.pop(key)
        self._change(kind, -num_bytes)

    def _change(self, kind: str, num_bytes: int) -> None:
        self.held[kind] += num_bytes
        self._total += num_bytes
        if self._total > self._highest.get(self.segment, -1):
            self.peaks[self.segment], self._highest[self.segment] = dict(self.held), self._total
