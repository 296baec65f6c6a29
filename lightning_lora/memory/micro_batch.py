"""The largest micro-batch that fits into memory, from traces of a few sizes."""

from __future__ import annotations

from collections.abc import Callable

from lightning_lora.errors import ConfigError
from lightning_lora.memory.parts import MemoryParts

_MOST = 2**20
"""Rows above which nobody asks."""


def largest_micro_batch(trace: Callable[[int], MemoryParts], limit: int) -> int:
    """The most rows of a micro-batch whose step stays within ``limit`` bytes; 0 if not even one row does.

    Two sizes are traced, and the line through them is followed to the limit. The size found is traced too, and lowered
    until its own trace is within the limit: some parts, such as the chunks of a loss, do not grow along a line.

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
    low, high = (1, first), (2, second)
    rows = _on_the_line(low, high, limit)
    fits = 2
    while rows > fits:
        found = trace(rows).total
        if found <= limit:
            return rows
        # The line was too low: draw it anew from the largest size that fits to the one that does not.
        low, high = high, (rows, found)
        rows = min(rows - 1, _on_the_line((2, second), high, limit))
    return fits


def _on_the_line(low: tuple[int, int], high: tuple[int, int], limit: int) -> int:
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return _MOST if slope <= 0 else min(_MOST, int(low[0] + (limit - low[1]) / slope))
