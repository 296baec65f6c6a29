"""The largest micro-batch that fits into memory, from traces of a few sizes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from lightning_lora.errors import StrategyError
from lightning_lora.memory.parts import MemoryParts

_MOST = 2**20
"""Rows above which nobody asks."""
_TRIES = 6
"""Sizes traced beside the two smallest, and beside the largest where there is one."""

_Traced = tuple[int, int]
"""Rows, and bytes of their step."""


def largest_micro_batch(trace: Callable[[int], MemoryParts], limit: int, allowed: Iterable[int] | None = None) -> int:
    """The most rows of a micro-batch whose step stays within ``limit`` bytes; 0 if not even the fewest rows do.

    The two smallest sizes are traced, and the line through them is followed to the limit. The size found is traced too.
    If it does not fit, as parts such as attention do not grow along a line, sizes between are traced, six at most. The
    result has always been traced.

    Args:
        allowed: Sizes among which to choose, such as the divisors of a step's rows; the largest is traced first, and
            nothing else if it fits. None allows all.
    """
    if limit < 1:
        raise StrategyError(f"limit must be a positive number of bytes, got {limit}.")
    if allowed is None:
        return _largest(trace, limit, range(1, _MOST + 1), None)
    *smaller, largest = sorted(set(allowed))
    found = trace(largest).total
    return largest if found <= limit else _largest(trace, limit, smaller, (largest, found))


def _largest(trace: Callable[[int], MemoryParts], limit: int, sizes: Sequence[int], fails: _Traced | None) -> int:
    """The largest of ascending ``sizes`` that fits; ``fails`` is a larger one that is known not to."""
    known: list[_Traced] = []
    for rows in sizes[:2]:
        known.append((rows, trace(rows).total))
        if known[-1][1] > limit:
            return known[0][0] if len(known) > 1 else 0
    if len(known) < 2:
        return known[0][0] if known else 0
    fits, low, high = known[1], 1, len(sizes)
    place = bisect_right(sizes, _on_the_line(known[0], fits, limit)) - 1
    for attempt in range(_TRIES):
        if place <= low:
            break
        found = sizes[place], trace(sizes[place]).total
        if found[1] <= limit:
            fits, low = found, place
            if attempt == 0:
                break
        else:
            fails, high = found, place
        assert fails is not None
        place = min(high - 1, max(low + 1, bisect_right(sizes, _on_the_line(fits, fails, limit)) - 1))
    return fits[0]


def _on_the_line(low: _Traced, high: _Traced, limit: int) -> int:
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return _MOST if slope <= 0 else min(_MOST, int(low[0] + (limit - low[1]) / slope))
