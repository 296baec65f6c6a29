"""What the evaluations of verdict runs tell: steps to a loss, and since when an arm is behind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from lightning_lora.errors import DataError
from lightning_lora.study.matched.cells import CellStatus, Outcome
from lightning_lora.study.statistics.interval import ALPHA
from lightning_lora.study.statistics.stays_behind import pointwise, with_tokens
from lightning_lora.study.statistics.steps_to_loss import Reached, StepsToLoss, step_ratio, steps_to, target_loss
from lightning_lora.study.statistics.verdict import Verdict

Runs = Mapping[int, Outcome]
"""Seed to what its run has measured."""


def done_runs(statuses: Iterable[CellStatus], arm: str) -> Runs:
    """The verdict runs of an arm that are done."""
    return {
        run.cell.seed: run.outcome
        for run in statuses
        if run.cell.arm == arm and run.cell.phase == "verdict" and run.outcome is not None
    }


def target_of(base: Outcome | None, best: Sequence[Outcome]) -> float | None:
    """The loss at which 90 % of the baseline's gain is reached, before any verdict run; None if it gained nothing."""
    lasts = [run.evaluations[-1][2] for run in best if run.evaluations]
    if base is None or not base.evaluations or not lasts:
        return None
    start, end = base.evaluations[0][2], fmean(lasts)
    return target_loss(start, end) if end < start else None


def with_curves(verdict: Verdict, arm: Runs, baseline: Runs, target: float | None, alpha: float = ALPHA) -> Verdict:
    """The verdict with the tokens since which the arm is behind, and with steps to a loss.

    Args:
        target: The loss to reach (`target_of`).
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return verdict
    ours, theirs = ({seed: runs[seed] for seed in seeds} for runs in (arm, baseline))
    tokens, differences = common_evaluations(ours, theirs)
    if len(tokens) > 1 and len(seeds) > 1:
        verdict = with_tokens(verdict, tokens, pointwise(differences, alpha=alpha))
    return replace(verdict, steps=steps_compared(ours, theirs, target, alpha))


def common_evaluations(arm: Runs, baseline: Runs) -> tuple[list[float], list[list[float]]]:
    """Trained tokens (mean over seeds), and arm minus baseline by seed, at the evaluations that all seeds share.

    Both runs of a seed have seen the same rows when they have trained on the same number of tokens; seeds differ in
    tokens, so evaluations of different seeds belong together by the step of the baseline.
    """
    by_step: dict[int, list[tuple[int, float]]] = {}
    for seed, run in baseline.items():
        losses = {tokens: loss for _, tokens, loss in arm[seed].evaluations}
        for step, tokens, loss in run.evaluations:
            if tokens in losses:
                by_step.setdefault(step, []).append((tokens, losses[tokens] - loss))
    shared = [found for _, found in sorted(by_step.items()) if len(found) == len(baseline)]
    return [fmean(tokens for tokens, _ in found) for found in shared], [[gap for _, gap in found] for found in shared]


def steps_compared(arm: Runs, baseline: Runs, target: float | None, alpha: float = ALPHA) -> StepsToLoss:
    """Steps to ``target`` in both arms, or why there are none."""
    if any(run.rate_fell for runs in (arm, baseline) for run in runs.values()):
        return StepsToLoss(target, left_out="the learning rate falls during the runs, so steps depend on the schedule")
    if target is None:
        return StepsToLoss(left_out="the selection runs of the baseline have no evaluations, or gained nothing")
    try:
        ours, theirs = ({seed: _reached(run, target) for seed, run in runs.items()} for runs in (arm, baseline))
    except DataError:
        return StepsToLoss(target, left_out="runs have fewer than two evaluations (evaluations: log adds some)")
    ratio = step_ratio(ours, theirs, alpha)
    if math.isnan(ratio.ratio):
        return StepsToLoss(
            target, ours, theirs, left_out="in no seed has either run reached the loss between two evaluations"
        )
    return StepsToLoss(target, ours, theirs, ratio)


def _reached(run: Outcome, target: float) -> Reached:
    return steps_to([step for step, _, _ in run.evaluations], [loss for _, _, loss in run.evaluations], target)
