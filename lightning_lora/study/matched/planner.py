"""What a study wants to run now: a pure function of its settings and of what is finished.

Every worker may call it at any time. First the untrained base and the sweep of each arm, which widens until its best
rate is interior; then fresh seeds at the chosen rates; then further seeds, if the plan for seeds has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from textwrap import shorten

from lightning_lora.study.matched.cells import Cell, CellStatus, cell_key
from lightning_lora.study.matched.checks.work import TYPICAL_SWEEP
from lightning_lora.study.matched.judge import Judge
from lightning_lora.study.matched.judging.further import NOTHING_FURTHER, Further
from lightning_lora.study.matched.record import UNTRAINED, Phase
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.statistics.compare import corrected
from lightning_lora.study.statistics.rates.halving import FAR_WORSE, given_up
from lightning_lora.study.statistics.rates.over_rates import expected_best
from lightning_lora.study.statistics.rates.sweep import NextStep, Trial, next_step
from lightning_lora.study.statistics.verdict import Verdict


@dataclass(frozen=True)
class StudyPlan:
    """What a study wants now.

    Args:
        cells: All runs that it has asked for so far, finished or not, in the order to run them.
        choices: Arm to what its sweep does next, or has chosen.
        verdicts: What is found so far; empty as long as seeds are missing.
        expected: Number of runs that the whole study will take, as far as can be seen.
        further: What is found beside the verdicts.
        pruned: Key of a run that was given up after its first third, to the reason.
    """

    cells: tuple[Cell, ...]
    choices: Mapping[str, NextStep]
    verdicts: tuple[Verdict, ...]
    expected: int
    further: Further = NOTHING_FURTHER
    pruned: Mapping[str, str] = field(default_factory=dict)


def plan_study(spec: StudySpec, statuses: Iterable[CellStatus], data: Mapping[str, str]) -> StudyPlan:
    """Say which runs are wanted now, and what is found."""
    known = {status.cell.key: status for status in statuses}
    seed, choices = spec.selection_seeds[0], {}
    # The run that trains nothing and scores the base.
    key = cell_key(spec.arm(spec.baseline).config, data, "base", 0.0, seed)
    base = Cell(UNTRAINED, 0.0, seed, "base", key)
    wanted = _Wanted(spec, data, known, [base])
    scored = known.get(base.key)
    if scored is None or not scored.is_over:
        # Alone: a mistake in the config, the data or the scoring is found before anything is trained.
        waits = {arm.name: NextStep((), None, "the untrained base is scored first") for arm in spec.arms}
        return StudyPlan((base,), waits, (), 1 + _further(spec, waits, ()))
    pruned: dict[str, str] = {}
    for arm in spec.arms:
        choices[arm.name] = _Sweep(wanted, arm, pruned).next_step(scored)
    verdicts, further = _found(wanted, choices)
    cells = list(dict.fromkeys(wanted.cells))
    return StudyPlan(tuple(cells), choices, verdicts, len(cells) + _further(spec, choices, cells), further, pruned)


def _further(spec: StudySpec, choices: Mapping[str, NextStep], cells: Iterable[Cell]) -> int:
    """How many runs will be asked for later, if sweeps take as many as they mostly do."""
    asked = Counter((cell.arm, cell.phase) for cell in cells)
    further = 0
    for name, step in choices.items():
        if step.problem:
            continue
        if step.chosen is None:
            further += max(0, TYPICAL_SWEEP * len(spec.selection_seeds) - asked[name, "selection"])
        if not asked[name, "verdict"]:
            further += spec.plan.looks[0]
    if not choices[spec.baseline].problem and not asked[spec.baseline, "aa"]:
        further += len(spec.aa_seeds)
    return further


@dataclass
class _Wanted:
    """The runs that are asked for, in their order, and what is known of them."""

    spec: StudySpec
    data: Mapping[str, str]
    known: Mapping[str, CellStatus]
    cells: list[Cell]

    def cell(self, arm: ArmSpec, rate: float, seed: int, phase: Phase) -> Cell:
        """A run of an arm, not asked for yet."""
        return Cell(arm.name, rate, seed, phase, cell_key(arm.config, self.data, phase, rate, seed))

    def are_open(self, name: str, step: NextStep, seeds: Iterable[int], phase: Phase) -> bool:
        """Ask for the runs of an arm at its chosen rate; says whether one of them is not over."""
        if step.chosen is None or step.problem:
            return False
        asked = [self.cell(self.spec.arm(name), step.chosen, seed, phase) for seed in seeds]
        self.cells += asked
        return any(cell.key not in self.known or not self.known[cell.key].is_over for cell in asked)

    def mean_loss(self, cells: Sequence[Cell]) -> float | None:
        """Ask for runs; their mean loss, NaN if one failed, None if one is not over."""
        self.cells += cells
        runs = [self.known.get(cell.key) for cell in cells]
        if any(run is None or not run.is_over for run in runs):
            return None
        return fmean(math.nan if run is None or run.loss is None else run.loss for run in runs)


@dataclass
class _Sweep:
    """The sweep of one arm; asks for the runs that it wants, and says why it gives some up."""

    wanted: _Wanted
    arm: ArmSpec
    pruned: dict[str, str]

    def next_step(self, base: CellStatus) -> NextStep:
        """What the sweep does next."""
        if base.outcome is None:
            return NextStep((), None, "the base was not scored", f"the untrained base cannot be scored: {base.reason}")
        base_loss = base.outcome.rows.mean("selection")
        trials: list[Trial] = []
        rungs: dict[float, float] = {}
        while True:
            step = next_step(self.arm.learning_rates, trials, base_loss, self.wanted.spec.band)
            ended = self._ended(step.rates, rungs) if self.wanted.spec.halving else []
            if ended is None:
                return step
            going_on = [rate for rate in step.rates if rate not in {trial.rate for trial in ended}]
            losses = [self.wanted.mean_loss(self._runs(rate, "selection")) for rate in going_on]
            if reason := self._broken():
                return NextStep((), None, "every run failed", f"every run failed: {reason}")
            if any(loss is None for loss in losses):
                return step
            if not step.rates:
                return replace(step, expected_best=_expected(trials, base_loss))
            trials += ended
            trials += (Trial(rate, loss) for rate, loss in zip(going_on, losses, strict=True) if loss is not None)

    def _ended(self, rates: Iterable[float], rungs: dict[float, float]) -> list[Trial] | None:
        """Successive halving: the rates of which no more is run than the first third; None as long as that is open."""
        found = {rate: self.wanted.mean_loss(self._runs(rate, "rung")) for rate in rates}
        if any(loss is None for loss in found.values()):
            return None
        rungs |= {rate: loss for rate, loss in found.items() if loss is not None}
        far = given_up(rungs, self.wanted.spec.band)
        best = min(rungs, key=lambda rate: math.inf if math.isnan(rungs[rate]) else rungs[rate], default=math.nan)
        ended = []
        for rate in found:
            if math.isnan(rungs[rate]):
                ended.append(Trial(rate, math.nan))
            elif rate in far:
                ended.append(Trial(rate, math.nan, is_pruned=True))
                limit = f"{FAR_WORSE} bands ({FAR_WORSE * self.wanted.spec.band:g} nats)"
                reason = f"given up after a third of its steps: more than {limit} worse than learning rate {best:g}"
                self.pruned |= {cell.key: reason for cell in self._runs(rate, "rung")}
        return ended

    def _runs(self, rate: float, phase: Phase) -> list[Cell]:
        cells = [self.wanted.cell(self.arm, rate, seed, phase) for seed in self.wanted.spec.selection_seeds]
        if phase != "rung":
            return cells
        runs = self._runs(rate, "selection")
        return [replace(rung, goes_on=run.key) for rung, run in zip(cells, runs, strict=True)]

    def _broken(self) -> str:
        """Why all runs fail; "" if one is done or open, or diverged, which a lower rate may not."""
        runs = [self.wanted.known.get(cell.key) for cell in self.wanted.cells if cell.arm == self.arm.name]
        # The run that goes on from a rung tells whether it works.
        runs = [run for run in runs if run is None or run.cell.phase != "rung" or run.state != "done"]
        if not runs or any(run is None or run.state != "failed" or run.diverged for run in runs):
            return ""
        reason = next(run.reason for run in runs if run is not None)
        return shorten(reason.rstrip("."), 160, placeholder=" ...")


def _expected(trials: Iterable[Trial], base_loss: float) -> tuple[float, ...]:
    """The expected best of 1, 2, ... rates; empty where a loss is not known because its run was given up."""
    trials = list(trials)
    if any(trial.is_pruned for trial in trials):
        return ()
    losses = [base_loss if math.isnan(trial.loss) else min(trial.loss, base_loss) for trial in trials]
    return tuple(expected_best(losses, budget) for budget in range(1, len(losses) + 1))


def _found(wanted: _Wanted, choices: Mapping[str, NextStep]) -> tuple[tuple[Verdict, ...], Further]:
    """Ask for the verdict runs, look by look, and judge the arms whose runs are over."""
    spec, known, cells = wanted.spec, wanted.known, wanted.cells
    baseline = choices[spec.baseline]
    if baseline.chosen is None and not baseline.problem:
        return (), NOTHING_FURTHER
    found: dict[str, Verdict] = {}
    rivals = [arm.name for arm in spec.arms if arm.name != spec.baseline]
    four = [name for arms in spec.batch_penalty.values() for name in arms.values()]
    open_arms, open_batches, of_batches = list(rivals), bool(four), None
    no_runs = bool(baseline.problem) or all(choices[name].problem for name in rivals)
    # An arm that still sweeps is part of the number of comparisons.
    waits = any(choices[name].chosen is None and not choices[name].problem for name in rivals)
    for look in spec.plan.looks:
        if not open_arms and not open_batches:
            break
        seeds = spec.verdict_seeds(look)
        for name in dict.fromkeys((spec.baseline, *open_arms, *(four if open_batches else ()))):
            if not no_runs and wanted.are_open(name, choices[name], seeds, "verdict"):
                waits = True
        if look == spec.plan.looks[0] and not no_runs:
            wanted.are_open(spec.baseline, baseline, spec.aa_seeds, "aa")
        if waits:
            break
        judge = Judge(spec, choices, cells, known)
        found |= {name: judge.verdict(name, seeds) for name in open_arms}
        verdicts = corrected([found[name] for name in rivals], spec.primary)
        open_arms = [verdict.arm for verdict in verdicts if verdict.is_open]
        if open_batches:
            of_batches = judge.penalty(seeds)
            open_batches = of_batches.is_open
    judge = Judge(spec, choices, cells, known)
    verdicts = corrected([found[name] for name in rivals], spec.primary) if len(found) == len(rivals) else ()
    return tuple(judge.with_curves(verdict) for verdict in verdicts), judge.further(of_batches)
