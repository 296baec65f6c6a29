"""What a study says before it begins and after it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_lora.cli.study.estimate import Estimate
from lightning_lora.memory.run_step import gigabytes
from lightning_lora.study.matched.cells import CellStatus
from lightning_lora.study.matched.planner import StudyPlan
from lightning_lora.study.matched.progress import described, duration, promises
from lightning_lora.study.matched.record import RESULTS, VERDICTS
from lightning_lora.study.matched.spec import StudySpec


def before_begin(spec: StudySpec, expected: int, over: int, folder: Path, estimated: Estimate | None) -> list[str]:
    """Lines about the arms, what the study can show, and what it takes.

    Args:
        spec: The study.
        expected: Number of runs that it will take.
        over: Number of runs that an earlier start has finished.
        folder: The study folder.
        estimated: The time of a run; None if it is not known.
    """
    arms = ", ".join(arm.name for arm in spec.arms if arm.name != spec.baseline)
    lines = [f"study {spec.name}: {arms} against {spec.baseline}, in {folder}", *promises(spec)]
    if over:
        return [*lines, f"{over} runs are over already; about {expected - over} are left"]
    if estimated is None:
        return [*lines, f"about {expected} runs; how long they take is said after the first"]
    low, mostly, high = estimated.low, estimated.mostly, estimated.high
    scored = f"{low.passes:,} to {high.passes:,} passes over the held-out rows"
    if estimated.pass_seconds:
        scored += f" of {duration(estimated.pass_seconds)}"
    memory = f" and {gigabytes(estimated.peak_bytes)} of memory" if estimated.peak_bytes else ""
    times = f"{duration(estimated.seconds(low))} to {duration(estimated.seconds(high))}"
    return [
        *lines,
        f"{low.runs} to {high.runs} runs, mostly about {mostly.runs}, of {estimated.steps:,} steps, by plan "
        f"{duration(estimated.run_seconds)}{memory} each; {scored}",
        f"{times} for one worker, mostly {duration(estimated.total_seconds)}, without loading",
    ]


def after_end(plan: StudyPlan, statuses: Sequence[CellStatus], folder: Path) -> list[str]:
    """Lines about what was found, which runs failed, and where it is written."""
    lines = [f"{name}: learning rate {step.chosen:g}, {step.why}" for name, step in plan.choices.items() if step.chosen]
    for verdict in plan.verdicts:
        lines.append(verdict.headline)
        if verdict.steps is not None and verdict.steps.ratio is not None:
            lines.append(f"  steps to 90% of the gain of {verdict.baseline}, times its own: {verdict.steps}")
    lines += plan.further.sentences
    lines += [f"{described(run.cell)}: {run.reason}" for run in statuses if run.state == "pruned"]
    failed: dict[tuple[str, str], list[CellStatus]] = {}
    for status in statuses:
        if status.state == "failed":
            failed.setdefault((status.cell.arm, status.reason), []).append(status)
    for (arm, reason), runs in failed.items():
        lines.append(f"failed: {described(runs[0].cell) if len(runs) == 1 else f'{len(runs)} runs of {arm}'}: {reason}")
    return [*lines, f"written: {folder / RESULTS}, {folder / VERDICTS}"]
