"""A learning-rate sweep that widens until its best rate has a worse one on either side.

A pure function of what is measured: any worker may call it at any time, and gets the same next rates. One selection
seed, the whole horizon, the schedule of the verdict runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_lora.errors import StatisticsError
from lightning_lora.study.statistics.rates.rate_vertex import refined_rate
from lightning_lora.study.statistics.word import BAND, check_band

FACTOR = 3.0
"""Rates are this far apart, where a single rate starts the sweep."""
MOST_WIDENINGS = 4
"""Rates added on a side before a best rate there is called the edge of the sweep."""
AT_THE_EDGE = "best rate at the edge of the sweep"


@dataclass(frozen=True)
class Trial:
    """A finished selection run.

    Args:
        loss: Its loss on the selection rows, nats; NaN or infinite if it diverged.
        is_pruned: Whether it was given up early: it counts as worse than the others, and its loss as no number.
    """

    rate: float
    loss: float
    is_pruned: bool = False


@dataclass(frozen=True)
class NextStep:
    """What a sweep does next: measure ``rates``, or stop with ``chosen``.

    Args:
        rates: Rates to measure now; empty when the sweep is finished.
        chosen: The chosen rate of a finished sweep; None if every rate diverged.
        why: The reason, in a few words.
        problem: Why ``chosen`` cannot carry a verdict (`Arm.problem`); "" if it can.
        expected_best: Expected lowest loss with 1, 2, ... of the measured rates; empty before the end.
    """

    rates: tuple[float, ...]
    chosen: float | None
    why: str
    problem: str = ""
    expected_best: tuple[float, ...] = ()


def rate_key(rate: float) -> float:
    """``rate`` rounded to six digits, so that every worker names the same cell."""
    return float(f"{rate:.6g}")


def first_rates(centre: float) -> tuple[float, ...]:
    """The rates that a sweep around ``centre`` starts with.

    ``centre`` is what is expected: for full fine-tuning its learning rate, for LoRA ten times that, for the next rank
    the best rate of the last one.
    """
    return tuple(rate_key(centre * FACTOR**power) for power in (-1, 0, 1))


def next_step(
    start: Sequence[float],
    trials: Iterable[Trial],
    base_loss: float = math.inf,
    band: float = BAND,
    most_widenings: int = MOST_WIDENINGS,
) -> NextStep:
    """Say which rates to measure next, or which one is chosen and why.

    Args:
        start: The rates that the sweep starts with (`first_rates`, or those of the user). It widens by the ratio of
            the outermost two on the side of its best rate.
        trials: Finished runs; the order does not matter.
        base_loss: Loss of the untrained base on the same rows; a worse run has diverged.
        most_widenings: Rates to add on a side at most.

    Raises:
        ConfigError: If there are no rates, or one is not a positive number.
    """
    check_band(band)
    grid = _grid(start)
    trials = list(trials)
    losses = {rate_key(trial.rate): _capped(math.nan if trial.is_pruned else trial.loss, base_loss) for trial in trials}
    if missing := tuple(rate for rate in grid if rate not in losses):
        return NextStep(missing, None, "the first rates")
    grid, step = _widened(grid, losses, base_loss, most_widenings)
    if step is not None:
        return step
    best = min(grid, key=lambda rate: losses[rate])
    place = grid.index(best)
    if losses[best] >= base_loss or math.isinf(losses[best]):
        return NextStep((), None, "every rate diverged", "every rate of the sweep diverged")
    level = _plateau(grid, losses, place, band)
    if len(level) >= 3:
        return NextStep((), level[(len(level) - 1) // 2], f"flat: any rate from {level[0]:g} to {level[-1]:g} does")
    if place in (0, len(grid) - 1):
        return NextStep((), best, f"the best of {len(grid)} rates is at the edge", f"{AT_THE_EDGE}, {best:g}")
    if any(rate_key(trial.rate) in (grid[place - 1], grid[place + 1]) for trial in trials if trial.is_pruned):
        return NextStep((), best, f"{best:g} is the best of {len(grid)} rates; one beside it was given up early")
    return _refined(grid, losses, place, band)


def _grid(start: Sequence[float]) -> list[float]:
    grid = sorted({rate_key(rate) for rate in start})
    if not grid or not all(0 < rate < math.inf for rate in grid):
        raise StatisticsError(f"learning_rates must be positive numbers, at least one, got {list(start)}.")
    return grid


def _capped(loss: float, base_loss: float) -> float:
    """The loss, at most that of the untrained base: a diverged run is worse, and how much worse says nothing."""
    return base_loss if math.isnan(loss) else min(loss, base_loss)


def _widened(
    grid: list[float], losses: dict[float, float], base_loss: float, most: int
) -> tuple[list[float], NextStep | None]:
    """The grid with the rates that were added to it, and the next one to add, if any."""
    grid, added = list(grid), {"lower": 0, "higher": 0}
    while True:
        best = min(grid, key=lambda rate: losses[rate])
        all_diverged = losses[best] >= base_loss
        if best == grid[0] or all_diverged:
            side, rate = "lower", rate_key(grid[0] / (grid[1] / grid[0] if len(grid) > 1 else FACTOR))
        elif best == grid[-1]:
            side, rate = "higher", rate_key(grid[-1] * (grid[-1] / grid[-2]))
        else:
            return grid, None
        if added[side] == most:
            return grid, None
        added[side] += 1
        if rate not in losses:
            why = "every rate diverged so far" if all_diverged else f"the best rate is the {side[:-2]}est, {best:g}"
            return grid, NextStep((rate,), None, why)
        grid = sorted([*grid, rate])


def _plateau(grid: Sequence[float], losses: dict[float, float], place: int, band: float) -> Sequence[float]:
    """The rates around the best, side by side, whose losses are within the band of it."""
    limit = losses[grid[place]] + band
    low = high = place
    while low > 0 and losses[grid[low - 1]] < limit:
        low -= 1
    while high < len(grid) - 1 and losses[grid[high + 1]] < limit:
        high += 1
    return grid[low : high + 1]


def _refined(grid: Sequence[float], losses: dict[float, float], place: int, band: float) -> NextStep:
    """One more rate between the neighbours of the best, if it promises half a band."""
    lower, best, upper = grid[place - 1 : place + 2]
    proof = f"{lower:g} and {upper:g} are worse"
    tried = [rate for rate in losses if rate not in grid and lower < rate < upper]
    found = refined_rate((lower, best, upper), (losses[lower], losses[best], losses[upper]), band)
    if found is not None and not tried:
        return NextStep((rate_key(found.rate),), None, found.why)
    chosen = min([best, *tried], key=lambda rate: losses[rate])
    return NextStep((), chosen, f"{chosen:g} is the best of {len(grid) + len(tried)} rates, {proof}")
