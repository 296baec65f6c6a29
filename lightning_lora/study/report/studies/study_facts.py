"""What the parts of a study's report all ask of a study: its words, its verdict runs, what they have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from lightning_lora.study.matched.record import UNTRAINED, CellRecord, StudyRecord
from lightning_lora.study.report.numbers import difference
from lightning_lora.study.report.runs.run_record import RunRecord, is_run, read_run
from lightning_lora.study.statistics.arm import Arm


class StudyFacts:
    """A study, and what follows from it for all parts of its report."""

    def __init__(self, study: StudyRecord) -> None:
        self.study = study
        self.band = float(study.spec["band"])
        self.styles = {arm.name: number for number, arm in enumerate(study.arms)}
        self.verdicts: dict[str, Mapping[str, Any]] = {each["arm"]: each for each in study.verdicts}

    @property
    def over(self) -> int:
        """Number of runs that are done, have failed, or were given up."""
        return sum(cell.state in ("done", "failed", "pruned") for cell in self.study.cells)

    @cached_property
    def base_losses(self) -> dict[str, float]:
        """Phase to the loss of the untrained base, where it is known."""
        known = ((phase, self.study.base_loss(phase)) for phase in ("selection", "verdict"))
        return {phase: loss for phase, loss in known if loss is not None}

    def verdict_runs(self, arm: str) -> list[CellRecord]:
        """The runs of an arm that are judged and done, by seed."""
        done = [cell for cell in self.study.cells_of(arm, "verdict") if cell.state == "done"]
        return sorted(done, key=lambda cell: cell.seed)

    def losses(self, arm: str) -> Arm:
        """The verdict runs of an arm, for the statistics."""
        losses = {cell.seed: math.nan if cell.loss is None else cell.loss for cell in self.verdict_runs(arm)}
        failed = {cell.seed: cell.reason for cell in self.study.cells_of(arm, "verdict") if cell.state == "failed"}
        return Arm(arm, losses, failed, self.base_losses.get("verdict", math.inf))

    def mean_loss(self, arm: str) -> float | None:
        """Mean loss over the seeds of an arm."""
        means = list(self.losses(arm).means().values())
        return fmean(means) if means else None

    @property
    def run_spread(self) -> float | None:
        """Standard deviation over verdict seeds of the loss of the baseline; None where the noise floor tells it."""
        if self.study.noise_floor is not None:
            return None
        losses = [loss for loss in self.losses(self.study.baseline).means().values() if math.isfinite(loss)]
        return stdev(losses) if len(losses) > 1 else None

    @property
    def pair_spread(self) -> float | None:
        """Standard deviation over seeds of a paired difference: of the noise floor, else of the main comparison."""
        found = (self.study.noise_floor or self.verdicts.get(self.study.primary) or {}).get("spread")
        return None if found is None else float(found)

    @cached_property
    def watched(self) -> dict[str, tuple[int, RunRecord]]:
        """Arm to the first of its verdict runs that has events of a monitor, with its seed."""
        found = {}
        for arm in self.study.arms:
            for cell in self.verdict_runs(arm.name):
                folder = self.study.run_folder(cell)
                run = read_run(folder) if is_run(folder) else None
                if run and any(run.last_of(event) for event in ("capacity_verdict", "noise_scale")):
                    found[arm.name] = (cell.seed, run)
                    break
        return found

    def failures(self) -> list[CellRecord]:
        """Runs that failed, in the order of the study."""
        return [cell for cell in self.study.cells if cell.state == "failed" and cell.arm != UNTRAINED]


def headline(verdict: Mapping[str, Any]) -> str:
    """The sentence of a verdict with the names of both arms in every case, without why nobody can tell."""
    if verdict["verdict"] == "cannot tell":
        return f"Cannot tell whether {verdict['arm']} matches {verdict['baseline']}"
    return str(verdict["sentence"])


def why_open(verdict: Mapping[str, Any]) -> str:
    """Why nobody can tell; "" where there is a verdict."""
    if verdict["verdict"] != "cannot tell":
        return ""
    return str(verdict["sentence"]).removeprefix("cannot tell").lstrip(": ")


def with_interval(verdict: Mapping[str, Any]) -> str:
    """The difference of a verdict with its interval, in numbers."""
    mean, low, high = (verdict[name] for name in ("difference", "low", "high"))
    if low is None and high is None:
        return difference(mean).text
    ends = ["?" if end is None else difference(end).text for end in (low, high)]
    return f"{difference(mean).text} ({ends[0]} to {ends[1]})"
