"""What a study will do before it starts: runs, optimizer steps and passes over the held-out rows, as a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.rates.halving import FIRST_RUNG
from lightning_lora.study.statistics.rates.sweep import MOST_WIDENINGS
from lightning_lora.study.statistics.steps_to_loss import evaluation_steps

INTERIOR = 3
"""Rates that a sweep needs at least: one on either side of the best."""
TYPICAL_SWEEP = 5
"""Rates that a sweep takes mostly: three, one further out, one between."""


@dataclass(frozen=True)
class Work:
    """What a study does.

    Args:
        runs: Runs, with that of the untrained base.
        steps: Optimizer steps of all runs.
        lengths: Length of all runs together, in whole runs: one that is given up after a third counts as that.
        passes: Passes over all held-out rows that the study asks for, beside the validations of ``fit``. Of modules
            whose ``predict_step`` gives losses of rows.
    """

    runs: int = 0
    steps: int = 0
    lengths: float = 0.0
    passes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(each * times for each in vars(self).values()))


def planned_work(spec: StudySpec, steps: Mapping[str, int]) -> tuple[Work, Work, Work]:
    """What a study does at least, mostly, and at most.

    At least: no sweep widens and no look at the verdicts asks for more seeds. At most: each sweep widens as far as it
    may, tries one rate more, and all looks are taken.
    """
    least, most = spec.plan.looks[0], spec.plan.looks[-1]
    # The base is validated, for its loss or its loader, and scored.
    low = high = mostly = Work(runs=1, passes=2)
    for arm in spec.arms:
        rates = max(INTERIOR, len(arm.learning_rates))
        length, seeds = steps[arm.name], len(spec.selection_seeds)
        whole = _whole(spec, length)
        given_up = rates - INTERIOR if spec.halving else 0
        low += _selection(spec, length, rates - given_up) * seeds + _given_up(spec, length) * (given_up * seeds)
        mostly += _selection(spec, length, max(TYPICAL_SWEEP, rates)) * seeds
        high += _selection(spec, length, rates + MOST_WIDENINGS + 1) * seeds
        low, mostly, high = low + whole * least, mostly + whole * least, high + whole * most
    noise_floor = _whole(spec, steps[spec.baseline]) * len(spec.aa_seeds)
    return low + noise_floor, mostly + noise_floor, high + noise_floor


def _whole(spec: StudySpec, steps: int) -> Work:
    """One run: scored at its end, and after the steps of its evaluations."""
    evaluations = 0 if spec.evaluations is None else len(evaluation_steps(steps, spec.evaluations))
    return Work(1, steps, 1.0, 1 + evaluations)


def _selection(spec: StudySpec, steps: int, count: int) -> Work:
    """Selection runs; with halving each is scored after a third of its steps, too."""
    run = _whole(spec, steps)
    return (replace(run, passes=run.passes + 1) if spec.halving else run) * count


def _given_up(spec: StudySpec, steps: int) -> Work:
    """A selection run that is given up after its first third."""
    third = math.ceil(FIRST_RUNG * steps)
    grid = [] if spec.evaluations is None else evaluation_steps(steps, spec.evaluations)
    return Work(1, third, third / steps, 1 + sum(step <= third for step in grid))
