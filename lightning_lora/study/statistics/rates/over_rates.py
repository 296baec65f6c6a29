"""What several learning rates give together. None of this is a run, and none of it enters a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lora.errors import ResultFileError


@dataclass(frozen=True)
class Envelope:
    """The lowest loss over learning rates at each step.

    Args:
        losses: ``(steps,)`` the lowest loss; NaN where no rate has one.
        num_rates: Rates that it is the minimum of.
    """

    losses: NDArray[np.float64]
    num_rates: int

    @property
    def legend(self) -> str:
        """What to write beside the curve."""
        return f"best of {self.num_rates} rates at each step; no single run"


def envelope(losses: Mapping[float, ArrayLike]) -> Envelope:
    """The envelope of the curves of several rates at the same steps.

    A minimum of noisy curves is lower than any of them: with 5 equally good rates by 1.16 standard deviations of a run.

    Args:
        losses: Rate to ``(steps,)`` losses; values that are not finite are left out.

    Raises:
        DataError: If there is no curve, or curves differ in length.
    """
    curves = [np.asarray(curve, dtype=np.float64) for curve in losses.values()]
    if not curves or len({curve.shape for curve in curves}) > 1:
        raise ResultFileError(f"an envelope needs curves of one length, got {[curve.shape for curve in curves]}.")
    lowest = np.where(np.isfinite(stacked := np.stack(curves)), stacked, np.inf).min(0)
    return Envelope(np.where(np.isfinite(lowest), lowest, np.nan), len(curves))


def expected_best(losses: Sequence[float], budget: int) -> float:
    """The expected lowest loss of ``budget`` rates drawn from those measured, without replacement.

    ``sum_i C(n - i, budget - 1) / C(n, budget) x_(i)`` over the sorted losses, which is unbiased. On a grid of rates it
    describes this grid only. Diverged rates count with an infinite loss, or that of the untrained base.

    Raises:
        DataError: If the budget is not between 1 and the number of losses.

    References:
        Tang et al., *Showing Your Work Doesn't Always Work*, 2020, https://arxiv.org/abs/2004.13705
    """
    count = len(losses)
    if not 1 <= budget <= count:
        raise ResultFileError(f"the budget must be between 1 and the {count} measured rates, got {budget}.")
    ordered = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
    ways = [math.comb(count - place, budget - 1) for place in range(1, count + 1)]
    return math.fsum(way * loss for way, loss in zip(ways, ordered, strict=True) if way) / math.comb(count, budget)
