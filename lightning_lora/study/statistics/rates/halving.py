"""Successive halving, which is off by default: what may be given up early without deciding between close rates.

Short horizons prefer small rates where noise rules, and large rates early for LoRA, whose B starts at zero. So trials
are compared at the same place of the same schedule, not before a third of the horizon, and only what is far worse goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_lora.study.statistics.word import BAND

FIRST_RUNG = 1 / 3
"""Share of the horizon before which no trial is given up."""
FAR_WORSE = 5
"""Bands by which a trial must be worse than the best to be given up."""


def given_up(losses: Mapping[float, float], band: float = BAND) -> list[float]:
    """Rates of one arm to give up; never the best one or a neighbour of it.

    A rate that is given up counts as worse in `next_step`, and its loss is never reported as a number.

    Args:
        losses: Rate to loss, all after `FIRST_RUNG` of the same schedule. Never of verdict runs.
    """
    finite = {rate: math.inf if math.isnan(loss) else loss for rate, loss in losses.items()}
    if not finite:
        return []
    rates = sorted(finite)
    best = min(rates, key=lambda rate: finite[rate])
    place = rates.index(best)
    kept = rates[max(0, place - 1) : place + 2]
    return [rate for rate in rates if rate not in kept and finite[rate] > finite[best] + FAR_WORSE * band]
