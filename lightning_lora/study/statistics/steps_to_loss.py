"""How many steps an arm needs to a loss, against its baseline, where some runs never get there.

The target is fixed from the selection runs, not from the runs that are compared. Runs must be at the same place of the
same schedule: with a decaying learning rate the number of steps is a property of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from lightning_lora.errors import ResultFileError
from lightning_lora.study.statistics.crossed import paired_interval
from lightning_lora.study.statistics.interval import ALPHA

Bound = Literal["", "at least", "at most", "cannot tell"]


@dataclass(frozen=True)
class Reached:
    """When a run reached a loss.

    Args:
        steps: Steps, between two evaluations by interpolation; the last step if it is not reached.
        bound: ``"at least"`` if it is not reached, ``"at most"`` if it is below already at the first evaluation.
    """

    steps: float
    bound: Literal["", "at least", "at most"] = ""


@dataclass(frozen=True)
class StepRatio:
    """Steps of the arm over steps of the baseline, geometric mean over seeds.

    Args:
        ratio: The ratio; above 1 where the arm is slower. NaN if no seed says anything.
        low: Lower end of its interval.
        bound: On which side ``ratio`` is only a bound.
        seeds: Seeds that say something.
        not_reached: Seeds in which the arm, or for "at most" the baseline, did not reach the loss.
    """

    ratio: float
    low: float
    high: float
    bound: Bound
    seeds: int
    not_reached: int

    def __str__(self) -> str:
        if self.bound == "cannot tell":
            return f"cannot tell: {self.seeds} seeds say something, and not all in one direction"
        if self.bound:
            sign = ">=" if self.bound == "at least" else "<="
            why = f", not reached in {self.not_reached} of {self.seeds}" if self.not_reached else ""
            return f"{sign} {self.ratio:.3f}{why}"
        return f"{self.ratio:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class StepsToLoss:
    """The steps of an arm and of its baseline to one loss.

    Args:
        target: The loss to reach, nats; None where it is not known.
        arm: Seed to when the arm reached it.
        baseline: Seed to when the baseline reached it.
        ratio: Both compared; None where nothing can be compared.
        left_out: Why it is None; "" otherwise.
    """

    target: float | None = None
    arm: Mapping[int, Reached] = field(default_factory=dict)
    baseline: Mapping[int, Reached] = field(default_factory=dict)
    ratio: StepRatio | None = None
    left_out: str = ""

    def __str__(self) -> str:
        return f"left out: {self.left_out}" if self.ratio is None else str(self.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, None where there is no number."""
        plain: dict[str, Any] = dict.fromkeys(("ratio", "low", "high", "bound", "seeds", "not_reached"))
        plain |= {} if self.ratio is None else vars(self.ratio)
        plain |= {name: None for name in ("ratio", "low", "high") if not math.isfinite(plain[name] or 0.0)}
        reached = {
            name: {str(seed): [each.steps, each.bound] for seed, each in runs.items()}
            for name, runs in (("arm", self.arm), ("baseline", self.baseline))
        }
        return {"target": self.target, **plain, "reached": reached, "left_out": self.left_out, "text": str(self)}


def target_loss(base: float, best_full: float, share: float = 0.9) -> float:
    """The loss at which ``share`` of the gain of full fine-tuning is reached, from selection runs."""
    return base - share * (base - best_full)


def evaluation_steps(last: int, factor: float = 1.1) -> list[int]:
    """Steps to evaluate at: each at most ``factor`` times the one before, or one more; the last one is ``last``."""
    steps = [1]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, int(steps[-1] * factor))))
    return steps


def crossing(before: tuple[float, float], after: tuple[float, float], target: float) -> float:
    """The step at which the loss crosses ``target`` between two ``(step, loss)``, linear in the logarithm of steps."""
    (first, high), (second, low) = before, after
    return first * (second / first) ** ((high - target) / (high - low))


def steps_to(steps: Sequence[float], losses: Sequence[float], target: float) -> Reached:
    """Find the first evaluation at or below ``target`` of which the next one is too, and the crossing before it.

    Args:
        steps: Steps of the evaluations, ascending; one before the first step is left out. A grid in which each is at
            most 1.1 times the one before keeps the interpolation short.

    Raises:
        DataError: If there are no two evaluations after the start, or steps do not ascend.
    """
    if len(steps) != len(losses):
        raise ResultFileError(
            f"every evaluation has a step and a loss, got {len(steps)} steps and {len(losses)} losses."
        )
    curve = [(float(step), float(loss)) for step, loss in zip(steps, losses, strict=True) if step > 0]
    if len(curve) < 2 or any(first >= second for (first, _), (second, _) in pairwise(curve)):
        raise ResultFileError(f"steps to a loss need at least two evaluations in ascending steps, got {list(steps)}.")
    for place, ((step, loss), (_, following)) in enumerate(pairwise(curve)):
        if loss <= target and following <= target:
            if place == 0:
                return Reached(step, "at most")
            before = curve[place - 1]
            # A loss that bounced, or NaN, cannot be interpolated from.
            return Reached(crossing(before, (step, loss), target) if before[1] > target else step)
    return Reached(curve[-1][0], "at least")


def step_ratio(arm: Mapping[int, Reached], baseline: Mapping[int, Reached], alpha: float = ALPHA) -> StepRatio:
    """Compare the steps of an arm with those of its baseline, over the seeds of both.

    A seed in which both runs are bounds on the same side says nothing and is left out.

    Raises:
        DataError: If no seed is in both.
    """
    both = [(arm[seed], baseline[seed]) for seed in sorted(arm.keys() & baseline.keys())]
    if not both:
        raise ResultFileError("no seed has steps of both the arm and the baseline.")
    telling = [pair for pair in both if not (pair[0].bound and pair[0].bound == pair[1].bound)]
    if not telling:
        return StepRatio(math.nan, 0.0, math.inf, "cannot tell", 0, 0)
    logs = [math.log(ours.steps / theirs.steps) for ours, theirs in telling]
    lower = sum(ours.bound == "at least" or theirs.bound == "at most" for ours, theirs in telling)
    upper = sum(ours.bound == "at most" or theirs.bound == "at least" for ours, theirs in telling)
    found = paired_interval(logs, alpha=alpha)
    bound: Bound = "cannot tell" if lower and upper else "at least" if lower else "at most" if upper else ""
    missed = sum(each[bound == "at most"].bound == "at least" for each in telling) if bound else 0
    ratio, low, high = (float(np.exp(each)) for each in (found.mean, found.low, found.high))
    return StepRatio(ratio, 0.0 if upper else low, math.inf if lower else high, bound, len(telling), missed)
