"""Paired comparisons: two runs scored on the same held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 0.005
"""Difference in nats that does not count as worse."""
ENOUGH_ROWS = 256
"""Held-out rows needed for a useful interval."""
ENOUGH_SEEDS = 3
"""Orders of the data needed before a difference of differences is called a penalty."""


@dataclass(frozen=True)
class Comparison:
    """A larger batch, or rank, against a smaller one on the same held-out rows.

    Args:
        small: Rows per step of the smaller batch, or the smaller rank.
        large: Rows per step of the larger batch, or the larger rank.
        difference: Mean loss of the larger minus that of the smaller, nats; positive where the larger has learnt less.
        error: Standard error of ``difference``, nats.
    """

    small: int
    large: int
    difference: float
    error: float

    @classmethod
    def of(cls, small: int, large: int, differences: Tensor) -> Comparison:
        r"""Compare from the differences ``(seeds, rows)``, taken as crossed random effects.

        ``error^2 = var_rows(mean over seeds) / rows + var_seeds(mean over rows) / seeds``. Each term still contains
        some of the variance of the other, so with several seeds the interval is a little too wide rather than too
        narrow. With one seed the second term is unknown and left out: the interval then does not contain what another
        order of the data would have given.
        """
        num_seeds, num_rows = differences.shape
        variance = float(differences.mean(0).var() / num_rows) if num_rows > 1 else math.inf
        if num_seeds > 1:
            variance += float(differences.mean(1).var() / num_seeds)
        return cls(small, large, float(differences.mean()), math.sqrt(variance))

    @property
    def is_worse(self) -> bool:
        """Whether the larger is worse by more than the tolerance and two standard errors."""
        return self.difference > max(TOLERANCE, 2 * self.error)

    @property
    def is_better(self) -> bool:
        """Whether the larger is better by more than the tolerance and two standard errors."""
        return -self.difference > max(TOLERANCE, 2 * self.error)

    def __str__(self) -> str:
        return f"{self.difference:+.4f} +- {2 * self.error:.4f} nats"


def compared(losses: Mapping[int, Tensor]) -> tuple[Comparison, ...]:
    """Compare every pair of batches, from the losses ``(seeds, rows)`` of each."""
    pairs = [(small, large) for small in losses for large in losses if small < large]
    return tuple(Comparison.of(small, large, losses[large] - losses[small]) for small, large in pairs)
