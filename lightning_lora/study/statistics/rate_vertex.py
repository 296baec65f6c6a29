"""A learning rate between those measured: the vertex of a parabola in the logarithm of the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEEP = 4.0
"""Where one side rises more than this many times the other, no parabola is fitted: it would flee from the cliff."""
GOLDEN = (3 - math.sqrt(5)) / 2
Three = tuple[float, float, float]


@dataclass(frozen=True)
class RefinedRate:
    """A rate to measure.

    Args:
        rate: The rate.
        why: What it was found by.
    """

    rate: float
    why: str


def vertex(rates: Three, losses: Three) -> tuple[float, float]:
    """Rate and loss at the vertex of the parabola through three points ``(log rate, loss)``, the middle one lowest.

    For equal steps ``h`` of the logarithm: ``x = x_b + (h / 2) (L_a - L_c) / (L_a - 2 L_b + L_c)``.
    """
    left, right = (math.log(rate / rates[1]) for rate in (rates[0], rates[2]))
    rise_left, rise_right = losses[0] - losses[1], losses[2] - losses[1]
    curvature = (rise_left / left - rise_right / right) / (left - right)
    slope = rise_left / left - curvature * left
    place = -slope / (2 * curvature)
    return rates[1] * math.exp(place), losses[1] + slope * place + curvature * place**2


def refined_rate(rates: Three, losses: Three, band: float) -> RefinedRate | None:
    """A rate that promises a loss lower by more than half of the band, or None.

    Args:
        rates: The best rate between its neighbours, ascending.
        losses: Their losses, those of diverged runs capped at the loss of the base.
        band: Nats that count as equal.
    """
    rises = losses[0] - losses[1], losses[2] - losses[1]
    if max(rises) > STEEP * min(rises):
        return _beside_a_cliff(rates, rises, band)
    place, loss = vertex(rates, losses)
    if losses[1] - loss <= band / 2:
        return None
    low, high = math.sqrt(rates[0] * rates[1]), math.sqrt(rates[1] * rates[2])
    return RefinedRate(min(max(place, low), high), "the vertex of a parabola through the best rate and its neighbours")


def _beside_a_cliff(rates: Three, rises: tuple[float, float], band: float) -> RefinedRate | None:
    """A golden section of the gentle side, which is where the valley is wide."""
    if min(rises) <= band / 2:
        return None
    gentle = rates[0] if rises[0] < rises[1] else rates[2]
    return RefinedRate(rates[1] * (gentle / rates[1]) ** GOLDEN, "a golden section of the side that rises gently")
