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
    """A rate to measure."""

    rate: float
    why: str


def vertex(rates: Three, losses: Three) -> tuple[float, float]:
    """Rate and loss at the vertex of the parabola through three points ``(log rate, loss)``, the middle one lowest.

    It lies at most half of the way to a neighbour, since the middle one is lowest.
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
    """
    place, loss = vertex(rates, losses)
    if losses[1] - loss <= band / 2:
        return None
    rises = losses[0] - losses[1], losses[2] - losses[1]
    if max(rises) > STEEP * min(rises):
        # The valley is wide on the side that rises gently.
        gentle = rates[0] if rises[0] < rises[1] else rates[2]
        place = rates[1] * (gentle / rates[1]) ** GOLDEN
        return RefinedRate(place, "a golden section of the side that rises gently")
    return RefinedRate(place, "the vertex of a parabola through the best rate and its neighbours")
