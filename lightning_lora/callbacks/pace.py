"""How fast training goes: tokens or rows per second over the time since the last reading."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Pace:
    """Counts what batches hold and divides by the time that passed, pauses left out.

    A count on an accelerator stays there until it is read, so counting never waits for the device.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything and start the clock."""
        self.unit: str | None = None
        self._count: Tensor | int = 0
        self._start = time.perf_counter()
        self._pause: float | None = None

    def pause(self) -> None:
        """Stop the clock, for what is not training."""
        self._pause = time.perf_counter()

    def resume(self) -> None:
        """Let the clock run on after a pause."""
        if self._pause is not None:
            self._start += time.perf_counter() - self._pause
            self._pause = None

    @property
    def seconds(self) -> float:
        """Time since the last reading."""
        return time.perf_counter() - self._start

    def add(self, batch: Any) -> None:
        """Count one batch."""
        count, unit = count_items(batch)
        self._count = count if unit != self.unit else self._count + count
        self.unit = unit

    def read(self) -> tuple[str, float] | None:
        """``("tokens", per second)`` or ``("rows", per second)`` since the last reading, which starts a new window."""
        unit, count, seconds = self.unit, float(self._count), self.seconds
        self.restart()
        return (unit, count / seconds) if unit and count else None


def count_items(batch: Any) -> tuple[Tensor | int, str | None]:
    """How much a batch holds, and of what.

    Tokens that are not padding where there is an ``attention_mask`` of one number per token, else all of
    ``input_ids``, else rows: the first dimension of the first tensor.
    """
    if isinstance(batch, Mapping):
        mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # a 4-D mask is a bias for attention, not a count
            return mask.detach().sum(), "tokens"
        if isinstance(tokens, Tensor):
            return tokens.numel(), "tokens"
    rows = count_rows(batch)
    return rows, "rows" if rows else None


def count_rows(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; 0 where there is none. A packed row is one row."""
    tensor = _first_tensor(batch)
    if tensor is None:
        return 0
    return tensor.shape[0] if tensor.dim() else 1


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((tensor for tensor in map(_first_tensor, children) if tensor is not None), None)


def count_supervised(batch: Any) -> Tensor | None:
    """Tokens that a causal language model learns from, on the device of the batch; None where there are no labels.

    The first label of a row is nobody's target.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return None
    return (labels[..., 1:] != -100).sum()
