"""From when on an arm is behind: the evaluation from which its pointwise interval stays above zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lightning_lora.errors import ResultFileError
from lightning_lora.study.statistics.crossed import paired_interval
from lightning_lora.study.statistics.interval import ALPHA, Interval
from lightning_lora.study.statistics.verdict import Verdict


def pointwise(
    differences: Sequence[ArrayLike], tokens: ArrayLike | None = None, alpha: float = ALPHA
) -> list[Interval]:
    """The interval at every evaluation, each for itself: over many of them some are wrong by chance.

    Args:
        differences: For each evaluation, arm minus baseline: ``(seeds,)`` or ``(seeds, rows)``.
        tokens: ``(rows,)`` supervised tokens of each held-out row.
    """
    return [paired_interval(each, tokens, alpha=alpha) for each in differences]


def stays_behind_after(trained_tokens: Sequence[float], intervals: Sequence[Interval]) -> float | None:
    """Trained tokens at the first evaluation from which the lower end stays above zero to the end; None if never.

    Raises:
        DataError: If there is not one interval for each evaluation.
    """
    if len(trained_tokens) != len(intervals):
        raise ResultFileError(f"each of the {len(trained_tokens)} evaluations needs an interval, got {len(intervals)}.")
    behind = np.array([interval.low > 0 for interval in intervals], dtype=bool)
    if not len(behind) or not behind[-1]:
        return None
    others = np.flatnonzero(~behind)
    return float(trained_tokens[int(others[-1]) + 1 if len(others) else 0])


def with_tokens(verdict: Verdict, trained_tokens: Sequence[float], intervals: Sequence[Interval]) -> Verdict:
    """The verdict with the tokens from which the arm stays behind, if it falls behind."""
    if verdict.verdict != "behind":
        return verdict
    return replace(verdict, after_tokens=stays_behind_after(trained_tokens, intervals))
