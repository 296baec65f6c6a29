"""The largest micro-batch that fits into memory, from traces of a few sizes."""

from __future__ import annotations

from collections.abc import Callable

from lightning_lora.errors import ConfigError
from lightning_lora.memory.parts import MemoryParts

_MOST = 2**20
"""Rows above which nobody asks."""
_TRIES = 6
"""Sizes traced beside the first two."""


def largest_micro_batch(trace: Callable[[int], MemoryParts], limit: int) -> int:
    """The most rows of a micro-batch whose step stays within ``limit`` bytes; 0 if not even one row does.

    Two sizes are traced, and the line through them is followed to the limit. The size found is traced too. If
    it does not fit, as parts such as attention do not grow along a line, sizes between are traced, six at most. The
    result has always been traced.

    Args:
        trace: The memory of a step with so many rows.
        limit: Bytes that the step may hold.
    """
    if limit < 1:
        raise ConfigError(f"limit must be a positive number of bytes, got {limit}.")
    first = trace(1).total
    if first > limit:
        return 0
    second = trace(2).total
    if second > limit:
        return 1
    fits, fails = (2, second), None
    rows = max(2, _on_the_line((1, first), (2, second), limit))
    for _ in range(_TRIES):
        if rows <= fits[0]:
            break
        found = trace(rows).total
        if found <= limit:
            fits = (rows, found)
            if fails is None:
                break
        else:
            fails = (rows, found)
        assert fails is not None
        rows = min(fails[0] - 1, max(fits[0] + 1, _on_the_line(fits, fails, limit)))
    return fits[0]


def _on_the_line(low: tuple[int, int], high: tuple[int, int], limit: int) -> int:
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return _MOST if slope <= 0 else min(_MOST, int(low[0] + (limit - low[1]) / slope))
