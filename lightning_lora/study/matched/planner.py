"""What a study wants to run now: a pure function of its settings and of what is finished.

Every worker may call it at any time. First the untrained base and the sweep of each arm, which widens until its best
rate is interior; then fresh seeds at the chosen rates; then further seeds, if the plan for seeds has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from textwrap import shorten

from lightning_lora.study.matched.cells import Cell, CellStatus, cell_key
from lightning_lora.study.matched.judge import Judge
from lightning_lora.study.matched.judging.further import NOTHING_FURTHER, Further
from lightning_lora.study.matched.record import UNTRAINED, Phase
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.statistics.compare import corrected
from lightning_lora.study.statistics.rates.over_rates import expected_best
from lightning_lora.study.statistics.rates.sweep import NextStep, Trial, next_step
from lightning_lora.study.statistics.verdict import Verdict

TYPICAL_SWEEP = 5
"""Runs that the sweep of an arm takes mostly, for estimates: three rates, one further out, one between."""


@dataclass(frozen=True)
class StudyPlan:
    """What a study wants now.

    Args:
        cells: All runs that it has asked for so far, finished or not, in the order to run them.
        choices: Arm to what its sweep does next, or has chosen.
        verdicts: What is found so far; empty as long as seeds are missing.
        expected: Number of runs that the whole study will take, as far as can be seen.
        further: What is found beside the verdicts.
    """

    cells: tuple[Cell, ...]
    choices: Mapping[str, NextStep]
    verdicts: tuple[Verdict, ...]
    expected: int
    further: Further = NOTHING_FURTHER


def plan_study(spec: StudySpec, statuses: Iterable[CellStatus], data: Mapping[str, str]) -> StudyPlan:
    """Say which runs are wanted now, and what is found.

    Args:
        spec: The study.
        statuses: What is known of the runs asked for before; the order does not matter.
        data: Fingerprints of the data files.
    """
    known = {status.cell.key: status for status in statuses}
    base = base_cell(spec, data)
    cells, choices = [base], {}
    scored = known.get(base.key)
    if scored is None or not scored.is_over:
        # Alone: a mistake in the config, the data or the scoring is found before anything is trained.
        waits = {arm.name: NextStep((), None, "the untrained base is scored first") for arm in spec.arms}
        return StudyPlan((base,), waits, (), 1 + _further(spec, waits, ()))
    for arm in spec.arms:
        choices[arm.name] = _sweep(spec, arm, data, known, scored, cells)
    verdicts, further = _found(spec, data, known, choices, cells)
    cells = list(dict.fromkeys(cells))
    return StudyPlan(tuple(cells), choices, verdicts, len(cells) + _further(spec, choices, cells), further)


def base_cell(spec: StudySpec, data: Mapping[str, str]) -> Cell:
    """The run that trains nothing and scores the base."""
    seed = spec.selection_seeds[0]
    return Cell(UNTRAINED, 0.0, seed, "base", cell_key(spec.arm(spec.baseline).config, data, "base", 0.0, seed))


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


def make_cell(arm: ArmSpec, rate: float, seed: int, phase: Phase, data: Mapping[str, str]) -> Cell:
    """A run of an arm."""
    return Cell(arm.name, rate, seed, phase, cell_key(arm.config, data, phase, rate, seed))


def _sweep(
    spec: StudySpec,
    arm: ArmSpec,
    data: Mapping[str, str],
    known: Mapping[str, CellStatus],
    base: CellStatus,
    cells: list[Cell],
) -> NextStep:
    """Append the selection runs of an arm that are wanted, and say what its sweep does next."""
    if base.outcome is None:
        return NextStep((), None, "the base was not scored", f"the untrained base cannot be scored: {base.reason}")
    base_loss = base.outcome.rows.mean("selection")
    trials: list[Trial] = []
    while True:
        step = next_step(arm.learning_rates, trials, base_loss, spec.band)
        wanted = [
            [make_cell(arm, rate, seed, "selection", data) for seed in spec.selection_seeds] for rate in step.rates
        ]
        cells += (cell for of_rate in wanted for cell in of_rate)
        over = [(rate, _loss_of(of_rate, known)) for rate, of_rate in zip(step.rates, wanted, strict=True)]
        if any(loss is None for _, loss in over):
            return step
        if reason := _broken(arm, cells, known):
            return NextStep((), None, "every run failed", f"every run failed: {reason}")
        if not wanted:
            losses = [base_loss if math.isnan(trial.loss) else min(trial.loss, base_loss) for trial in trials]
            return replace(step, expected_best=tuple(expected_best(losses, n + 1) for n in range(len(losses))))
        trials += (Trial(rate, loss) for rate, loss in over if loss is not None)


def _broken(arm: ArmSpec, cells: Iterable[Cell], known: Mapping[str, CellStatus]) -> str:
    """Why all runs of an arm fail; "" if one is done, or diverged, which a lower rate may not."""
    runs = [known[cell.key] for cell in cells if cell.arm == arm.name and cell.phase == "selection"]
    if any(run.state == "done" or run.diverged for run in runs):
        return ""
    return shorten(runs[0].reason.rstrip("."), 160, placeholder=" ...") if runs else ""


def _loss_of(cells: Iterable[Cell], known: Mapping[str, CellStatus]) -> float | None:
    """Mean loss over selection seeds; NaN if one failed, None if one is not over."""
    runs = [known.get(cell.key) for cell in cells]
    if any(run is None or not run.is_over for run in runs):
        return None
    return fmean(math.nan if run is None or run.loss is None else run.loss for run in runs)


def _found(
    spec: StudySpec,
    data: Mapping[str, str],
    known: Mapping[str, CellStatus],
    choices: Mapping[str, NextStep],
    cells: list[Cell],
) -> tuple[tuple[Verdict, ...], Further]:
    """Append the verdict runs that are wanted, look by look, and judge the arms whose runs are over."""
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
            if not no_runs and _wants(spec, name, choices[name], seeds, "verdict", data, known, cells):
                waits = True
        if look == spec.plan.looks[0] and not no_runs:
            _wants(spec, spec.baseline, baseline, spec.aa_seeds, "aa", data, known, cells)
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


def _wants(
    spec: StudySpec,
    name: str,
    step: NextStep,
    seeds: Iterable[int],
    phase: Phase,
    data: Mapping[str, str],
    known: Mapping[str, CellStatus],
    cells: list[Cell],
) -> bool:
    """Append the runs of an arm at its chosen rate; says whether one of them is not over."""
    if step.chosen is None or step.problem:
        return False
    wanted = [make_cell(spec.arm(name), step.chosen, seed, phase, data) for seed in seeds]
    cells += wanted
    return any(cell.key not in known or not known[cell.key].is_over for cell in wanted)
