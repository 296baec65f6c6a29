"""What a study with so many seeds can say: the chance of each word, for a true difference and a spread between seeds.

Everything is a function of band / spread and true difference / spread, where the spread is the standard deviation over
seeds of the *paired difference*. Differences are taken as normal; the choice of rows is not in it (`rows_needed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lightning_lora.student_t import t_quantile
from lightning_lora.study.statistics.interval import ALPHA
from lightning_lora.study.statistics.seed_plan import SeedPlan

_STUDIES = 40_000


@dataclass(frozen=True)
class Chances:
    """How often each word is said, as shares of studies."""

    matches: float
    behind: float
    ahead: float
    seeds: float


def chances(plan: SeedPlan, band: float, spread: float, truth: float = 0.0) -> Chances:
    """The chance of each word: exact for one look, from simulated studies for several.

    Args:
        spread: Standard deviation over seeds of the paired difference, nats.
        truth: True difference, nats; positive where the arm is behind.
    """
    if len(plan.looks) == 1:
        return Chances(*_fixed(plan.looks[0], plan.alpha, band / spread, truth / spread), plan.looks[0])
    return _simulated(plan, band / spread, truth / spread)


def seeds_for(chance: float, ratio: float, alpha: float = ALPHA) -> int:
    """The smallest number of seeds with which equal arms get "matches" with probability ``chance``.

    Args:
        ratio: The band over the spread.
    """
    low, high = 2, 3
    while _fixed(high, alpha, ratio, 0.0)[0] < chance:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fixed(middle, alpha, ratio, 0.0)[0] >= chance else (middle, high)
    return high


def widest_spread(chance: float, seeds: int, alpha: float = ALPHA) -> float:
    """The largest spread, in bands, with which equal arms get "matches" with probability ``chance``."""
    low, high = 1e-3, 1e3  # of the band over the spread
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _fixed(seeds, alpha, middle, 0.0)[0] >= chance else (middle, high)
    return 1 / high


def power_table(ratios: Sequence[float] = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4)) -> list[dict[str, float]]:
    """A row for each band / spread: seeds for 50, 80 and 90 % "matches", and what 3 and 5 seeds can say.

    Keys: ``ratio``, ``n50``, ``n80``, ``n90``; ``matches3`` and ``matches5`` of equal arms; ``behind3`` and
    ``behind5`` of an arm that is behind by two bands.
    """
    table = []
    for ratio in ratios:
        row: dict[str, float] = {"ratio": ratio}
        row |= {f"n{chance:.0%}".rstrip("%"): seeds_for(chance, ratio) for chance in (0.5, 0.8, 0.9)}
        for seeds in (3, 5):
            row[f"matches{seeds}"] = _fixed(seeds, ALPHA, ratio, 0.0)[0]
            row[f"behind{seeds}"] = _fixed(seeds, ALPHA, ratio, 2 * ratio)[1]
        table.append(row)
    return table


def chance_to_see_failures(share: float, seeds: int) -> float:
    """The chance that an arm that fails in ``share`` of seeds shows it in ``seeds`` seeds."""
    return 1 - (1 - share) ** seeds


def _fixed(seeds: int, alpha: float, band: float, truth: float) -> tuple[float, float, float]:
    """Chances of matches, behind and ahead; band and truth in units of the spread.

    The half-width is ``t / sqrt(n) q`` with ``q`` the observed spread over the true one. Given ``q`` the mean is
    normal, so the chances are an integral over the distribution of ``q``.
    """
    from scipy.special import ndtr

    q, weights = _observed_spreads(seeds - 1)
    half = t_quantile(1 - alpha, seeds - 1) / math.sqrt(seeds) * q
    inside, outside = band - half, np.maximum(half, band - half)
    matches = np.clip(ndtr((inside - truth) * math.sqrt(seeds)) - ndtr((-inside - truth) * math.sqrt(seeds)), 0, None)
    behind, ahead = ndtr((truth - outside) * math.sqrt(seeds)), ndtr((-outside - truth) * math.sqrt(seeds))
    return float(weights @ matches), float(weights @ behind), float(weights @ ahead)


@cache
def _observed_spreads(freedom: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights for the distribution of an observed spread over the true one, a chi over its root."""
    near, far = max(0.0, 1 - 9 / math.sqrt(2 * freedom)), 1 + 9 / math.sqrt(freedom)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    q = near + (far - near) * (nodes + 1) / 2
    log_scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    return q, weights * (far - near) / 2 * np.exp(log_scale + (freedom - 1) * np.log(q) - freedom * q**2 / 2)


def _simulated(plan: SeedPlan, band: float, truth: float) -> Chances:
    """The same from simulated studies that stop at the first look with a word."""
    drawn = truth + np.random.default_rng(0).standard_normal((_STUDIES, plan.looks[-1]))
    is_open, counts, seeds = np.ones(_STUDIES, bool), np.zeros(3), 0.0
    for before, look in zip((0, *plan.looks), plan.looks, strict=False):
        seeds += (look - before) * float(is_open.mean())
        mean = drawn[:, :look].mean(1)
        half = t_quantile(1 - plan.alpha, look - 1) * drawn[:, :look].std(1, ddof=1) / math.sqrt(look)
        matches = np.abs(mean) + half < band
        words = np.stack([matches, (mean > half) & ~matches, (mean < -half) & ~matches])
        counts += (words & is_open).sum(1)
        is_open &= ~words.any(0)
    matches, behind, ahead = (counts / _STUDIES).tolist()
    return Chances(matches, behind, ahead, seeds)
