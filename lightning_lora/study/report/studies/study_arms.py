"""The table of arms: what each has learnt, what it costs, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.study.matched.record import UNTRAINED, ArmRecord, CellRecord
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Cell, Figure, Section, Table, Words
from lightning_lora.study.report.numbers import NOTHING, count, nats, rate, seconds, size, words
from lightning_lora.study.report.studies.study_facts import StudyFacts
from lightning_lora.study.statistics.before_start import about_the_band
from lightning_lora.study.statistics.steps_to_loss import Reached, step_ratio, steps_to, target_loss

_RANK = "lora.rank"


def study_arms(facts: StudyFacts) -> Section:
    """The table, with what the band means here, and the differences by rank."""
    blocks: list[Block] = [_arms(facts)]
    base, full = facts.base_losses.get("verdict"), facts.mean_loss(facts.study.baseline)
    if base is not None and full is not None:
        blocks += [
            Words(f"{line[:1].upper()}{line[1:]}.", {}, "note") for line in about_the_band(facts.band, base, full)
        ]
    if chart := _by_rank(facts):
        blocks.append(chart)
    return Section("arms", "Arms", blocks)


def _arms(facts: StudyFacts) -> Table:
    slower = _step_ratios(facts)
    columns = [
        "arm",
        "verdict",
        "difference",
        "loss",
        "worst seed",
        "seeds",
        "rate",
        "trained",
        "peak memory",
        "time",
        "on disk",
    ]
    columns += ["steps to 90% of the gain, against baseline"] if slower else []
    rows = []
    if (base := facts.base_losses.get("verdict")) is not None:
        rows.append([words(UNTRAINED), NOTHING, NOTHING, nats(base), *([NOTHING] * (len(columns) - 4))])
    for arm in facts.study.arms:
        runs, losses = facts.verdict_runs(arm.name), facts.losses(arm.name)
        verdict, worst = facts.verdicts.get(arm.name), losses.worst()
        is_baseline = arm.name == facts.study.baseline
        row = [
            words(arm.name),
            words("baseline") if is_baseline else words(str(verdict["verdict"])) if verdict else NOTHING,
            _difference(verdict),
            nats(facts.mean_loss(arm.name)),
            nats(worst[1] if worst else None),
            count(len(runs)),
            rate(arm.chosen_rate),
            count(_mean(runs, "trained_parameters")),
            size(_mean(runs, "peak_bytes")),
            seconds(_mean(runs, "seconds")),
            size(_mean(runs, "saved_bytes")),
        ]
        rows.append([*row, slower.get(arm.name, NOTHING)] if slower else row)
    note = (
        "Loss in nats per supervised token on the verdict rows, mean over seeds; rates in terms of full fine-tuning. "
        "Memory, time and size are means over seeds."
    )
    if slower:
        note += (
            " Steps: geometric mean over seeds of those of the arm over those of the baseline, to the loss at which "
            "the baseline's selection runs have 90% of their gain; it needs the same place of the same schedule."
        )
    return Table("arm-table", "Arms at their best learning rates", columns, rows, note)


def _difference(verdict: Mapping[str, Any] | None) -> Cell:
    if verdict is None or verdict["difference"] is None:
        return NOTHING
    mean, low, high = (nats(verdict[name]).text for name in ("difference", "low", "high"))
    return Cell(f"{mean} ({low} to {high})", verdict["difference"])


def _mean(runs: list[CellRecord], name: str) -> float | None:
    known = [value for run in runs if (value := getattr(run, name)) is not None]
    return fmean(known) if known else None


def _step_ratios(facts: StudyFacts) -> dict[str, Cell]:
    """Arm to its steps against those of the baseline; empty where curves or the untrained loss are missing."""
    baseline = facts.study.baseline
    selection = [
        cell.loss
        for cell in facts.study.cells_of(baseline, "selection")
        if cell.loss is not None and math.isfinite(cell.loss)
    ]
    if "selection" not in facts.base_losses or not selection:
        return {}
    target = target_loss(facts.base_losses["selection"], min(selection))
    reached = {arm.name: _reached(facts, arm.name, target) for arm in facts.study.arms}
    if not reached[baseline]:
        return {}
    ratios = {}
    for name, steps in reached.items():
        if name != baseline and steps.keys() & reached[baseline].keys():
            ratio = step_ratio(steps, reached[baseline])
            ratios[name] = Cell(str(ratio), None if math.isnan(ratio.ratio) else ratio.ratio)
    return ratios


def _reached(facts: StudyFacts, arm: str, target: float) -> dict[int, Reached]:
    found = {}
    for run in facts.verdict_runs(arm):
        points = [(point.step, point.val_loss) for point in facts.study.curve(run) if point.val_loss is not None]
        try:
            found[run.seed] = steps_to([step for step, _ in points], [loss for _, loss in points], target)
        except DataError:  # fewer than two evaluations
            continue
    return found


def _by_rank(facts: StudyFacts) -> Figure | None:
    """Differences against the rank of the arms that differ in it."""
    points = []
    for arm in facts.study.arms:
        verdict = facts.verdicts.get(arm.name)
        rank = _rank(arm)
        if isinstance(rank, int) and verdict and None not in (verdict["difference"], verdict["low"], verdict["high"]):
            points.append((float(rank), verdict))
    if len({rank for rank, _ in points}) < 2:
        return None
    points.sort(key=lambda each: each[0])
    means, low, high = ([float(verdict[name]) for _, verdict in points] for name in ("difference", "low", "high"))
    ranks = [rank for rank, _ in points]
    series = [
        Series("difference", list(zip(ranks, means, strict=True)), low=low, high=high),
        Series("band", [(ranks[0], facts.band), (ranks[-1], facts.band)], style=7),
    ]
    x = Axis.around("rank", ranks, is_log=True)
    y = Axis.around(f"nats above {facts.study.baseline}", [*low, *high, 0.0, facts.band])
    said = ", ".join(f"rank {rank:g} {nats(mean).text}" for rank, mean in zip(ranks, means, strict=True))
    return line_chart("by-rank", "Difference by rank, with its interval", f"In nats: {said}.", x, y, series)


def _rank(arm: ArmRecord) -> int | None:
    """The rank of an arm, by its overrides or its config; None for full fine-tuning."""
    for name, value in arm.overrides.items():
        if name.endswith(_RANK):
            return value
    found: Any = arm.config
    for name in ("model", "init_args", "lora", "rank"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
