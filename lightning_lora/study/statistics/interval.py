"""A mean difference with its interval, and the p-values of the claims that can be made about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_lora.student_t import t_above, t_quantile

ALPHA = 0.05
"""One-sided level of every interval: the true mean is below ``low`` in at most this share of studies."""


@dataclass(frozen=True)
class Interval:
    """A mean difference between two arms and what it is worth.

    Args:
        mean: Mean of arm minus baseline, nats; positive where the arm has learnt less.
        error: Standard error of ``mean``, nats; infinite where there is no second value to tell it from.
        freedom: Degrees of freedom of ``error``.
        alpha: One-sided level; ``(low, high)`` covers the true mean in ``1 - 2 alpha`` of studies.
    """

    mean: float
    error: float
    freedom: float
    alpha: float = ALPHA

    @property
    def half_width(self) -> float:
        """``t(1 - alpha, freedom) * error``, nats."""
        if self.error == 0 or math.isinf(self.error):
            return self.error
        return t_quantile(1 - self.alpha, self.freedom) * self.error

    @property
    def low(self) -> float:
        """The lower end, nats."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end, nats."""
        return self.mean + self.half_width

    @property
    def p_behind(self) -> float:
        """The probability of a mean this high if the arm is not behind."""
        return self._p(self.mean)

    @property
    def p_ahead(self) -> float:
        """The probability of a mean this low if the arm is not ahead."""
        return self._p(-self.mean)

    def p_equal(self, band: float) -> float:
        """The p-value of two one-sided tests that the true mean is inside of ``-band .. band``.

        It is at most ``alpha`` where the interval lies inside of the band.
        """
        return max(self._p(self.mean + band), self._p(band - self.mean))

    def inside(self, band: float) -> float:
        """The probability that the true mean is inside of ``-band .. band``, all means being equally likely before."""
        return max(0.0, 1 - self._p(self.mean + band) - self._p(band - self.mean))

    def _p(self, distance: float) -> float:
        """The probability of a mean this far on the claimed side of a limit, if the truth is at the limit."""
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return 0.5 if math.isinf(self.error) else t_above(distance / self.error, self.freedom)
