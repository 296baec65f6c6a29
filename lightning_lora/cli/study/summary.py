"""What a study says before it begins and after it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_lora.study.matched.cells import CellStatus
from lightning_lora.study.matched.planner import StudyPlan
from lightning_lora.study.matched.progress import described, duration
from lightning_lora.study.matched.record import RESULTS, VERDICTS
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.before_start import before_start


def before_begin(spec: StudySpec, plan: StudyPlan, folder: Path, over: int = 0) -> list[str]:
    """Lines about the arms, what the study can show, and what it takes.

    Args:
        spec: The study.
        plan: What it wants first.
        folder: The study folder.
        over: Runs that an earlier start has finished.
    """
    arms = ", ".join(arm.name for arm in spec.arms if arm.name != spec.baseline)
    lines = [f"study {spec.name}: {arms} against {spec.baseline}, in {folder}"]
    lines += before_start(spec.plan, spec.band)
    if over:
        return [*lines, f"{over} runs are over already; about {plan.expected - over} are left"]
    return lines


def time_lines(runs: int, steps: int, run_seconds: float, expected: int) -> list[str]:
    """The line about the time that a study takes."""
    total = duration(expected * run_seconds)
    return [f"about {expected} runs of {steps:,} steps, {duration(run_seconds)} each by plan: {total} for one worker"]


def after_end(plan: StudyPlan, statuses: Sequence[CellStatus], folder: Path) -> list[str]:
    """Lines about what was found, which runs failed, and where it is written."""
    lines = [f"{name}: learning rate {step.chosen:g}, {step.why}" for name, step in plan.choices.items() if step.chosen]
    lines += [verdict.headline for verdict in plan.verdicts]
    failed = [status for status in statuses if status.state == "failed"]
    lines += [f"failed: {described(status.cell)}: {status.reason}" for status in failed]
    return [*lines, f"written: {folder / RESULTS}, {folder / VERDICTS}"]
