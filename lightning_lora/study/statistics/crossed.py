r"""The interval of a mean difference over seeds and rows.

All seeds score the same held-out rows, so a row that favours one arm favours it in every seed: a t interval over seeds
alone covers far less than it says. Seeds and rows are both taken as random, crossed with each other:

``MS_S = R var(mean over rows)``, ``MS_R = S var(mean over seeds)``, ``MS_E = residual squares / ((S - 1)(R - 1))``,
``N = MS_S + MS_R - MS_E``, variance of the mean ``V = N / (S R)``, with the degrees of freedom
``v = N^2 / (MS_S^2 / (S - 1) + MS_R^2 / (R - 1) + MS_E^2 / ((S - 1)(R - 1)))``.

The half-width is the larger of ``t(v) sqrt(V)`` and that over seeds alone, ``t(S - 1) sqrt(MS_S / (S R))``, because
``N`` can come out near zero.

References:
    Clark, *The language-as-fixed-effect fallacy*, 1973 (the quasi-F); Satterthwaite, 1946 (the degrees of freedom).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lora.errors import ResultFileError
from lightning_lora.study.statistics.interval import ALPHA, Interval

Matrix = NDArray[np.float64]


def paired_interval(differences: ArrayLike, tokens: ArrayLike | None = None, *, alpha: float = ALPHA) -> Interval:
    """The interval of the mean of paired differences.

    Args:
        differences: Arm minus baseline, nats per token: ``(seeds, rows)`` where all seeds score the same rows. Where
            each seed has rows of its own, their means ``(seeds,)``: rows are then part of what differs between seeds.
        tokens: ``(rows,)`` supervised tokens of each row, which weigh it. None: every row counts the same.

    Returns:
        The interval over seeds and rows. With one seed it is over rows only: it says nothing of another seed.

    Raises:
        DataError: If there are no differences, one of them is not finite, or the weights do not fit.
    """
    found = np.asarray(differences, dtype=np.float64)
    if found.ndim not in (1, 2) or found.size == 0 or not np.isfinite(found).all():
        raise ResultFileError(
            f"differences must be finite numbers of shape (seeds,) or (seeds, rows), got shape {found.shape} with "
            f"{int((~np.isfinite(found)).sum())} not finite: leave out seeds that have no result."
        )
    if found.ndim == 1:
        return _over(found, alpha)
    weighed = linearised(found, tokens)
    num_seeds, num_rows = weighed.shape
    if num_seeds == 1:
        return _over(weighed[0], alpha)
    if num_rows == 1:
        return _over(weighed.mean(1), alpha)
    return _crossed(weighed, alpha)


def linearised(differences: Matrix, tokens: ArrayLike | None) -> Matrix:
    """Values whose plain mean is the token-weighted mean of ``differences``, and whose spread is its spread.

    ``u = D + w (d - D) / mean(w)`` with ``D`` the weighted mean of all ``d``.

    Raises:
        DataError: If the weights do not fit the rows, or are not positive.
    """
    if tokens is None:
        return differences
    weights = np.asarray(tokens, dtype=np.float64)
    if weights.shape != differences.shape[1:] or not (np.isfinite(weights) & (weights > 0)).all():
        raise ResultFileError(
            f"each of the {differences.shape[1]} rows needs a positive number of tokens, got weights of shape "
            f"{weights.shape}: leave out rows without supervised tokens."
        )
    mean = float((differences * weights).sum() / (weights.sum() * len(differences)))
    return mean + weights * (differences - mean) / weights.mean()


def mean_squares(values: Matrix) -> tuple[float, float, float]:
    """``MS_S``, ``MS_R`` and ``MS_E`` of ``(seeds, rows)``, at least two of each."""
    num_seeds, num_rows = values.shape
    of_seeds, of_rows = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    residual = values - of_seeds - of_rows + values.mean()
    squares = float((residual**2).sum()) / ((num_seeds - 1) * (num_rows - 1))
    return float(num_rows * of_seeds.var(ddof=1)), float(num_seeds * of_rows.var(ddof=1)), squares


def _over(values: Matrix, alpha: float) -> Interval:
    if len(values) == 1:
        return Interval(float(values[0]), math.inf, 1, alpha)
    return Interval(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1, alpha)


def _crossed(values: Matrix, alpha: float) -> Interval:
    num_seeds, num_rows = values.shape
    seeds, rows, residual = mean_squares(values)
    alone = _over(values.mean(1), alpha)
    total = seeds + rows - residual
    if total <= 0:
        return alone
    spread = seeds**2 / (num_seeds - 1) + rows**2 / (num_rows - 1) + residual**2 / ((num_seeds - 1) * (num_rows - 1))
    both = Interval(alone.mean, math.sqrt(total / values.size), total**2 / spread, alpha)
    return max(alone, both, key=lambda each: each.half_width)
