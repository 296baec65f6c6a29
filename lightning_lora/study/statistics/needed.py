"""How many seeds and rows a band needs, once their spreads are known."""

from __future__ import annotations

import math

from lightning_lora.student_t import t_quantile
from lightning_lora.study.statistics.interval import ALPHA


def seeds_needed(spread: float, room: float, alpha: float = ALPHA) -> int | None:
    """The smallest number ``n`` of seeds with ``t(1 - alpha, n - 1) spread / sqrt(n) < room``.

    Args:
        spread: Standard deviation over seeds of the paired difference.
        room: What the half-width must stay below: ``band - |difference|``.

    Returns:
        At least 2; None if there is no room.
    """
    if room <= 0:
        return None

    def enough(count: int) -> bool:
        return t_quantile(1 - alpha, count - 1) * spread / math.sqrt(count) < room

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def rows_needed(spread: float, room: float, alpha: float = ALPHA) -> int:
    """The number of rows from which they do not decide: their half-width is at most half of ``room``.

    Args:
        spread: Standard deviation over rows of the paired difference, weighed by tokens (`linearised`).
        room: The band, or what is left of it beside the difference.
    """
    return math.ceil((t_quantile(1 - alpha, math.inf) * spread / (room / 2)) ** 2)
