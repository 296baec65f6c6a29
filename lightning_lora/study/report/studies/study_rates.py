"""The learning-rate sweeps: one U for each arm, the chosen rate, and the runs that failed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

from lightning_lora.study.matched.record import CellRecord
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Cell, Figure, Section, Table
from lightning_lora.study.report.numbers import count, nats, rate, words
from lightning_lora.study.report.studies.study_facts import StudyFacts


def study_rates(facts: StudyFacts) -> Section | None:
    """The sweeps; None before the first of their runs is over."""
    tried = [cell for cell in facts.study.cells if cell.phase == "selection" and cell.state in ("done", "failed")]
    if not tried:
        return None
    figure = _figure(facts, tried)
    blocks: list[Block] = [figure] if figure else []
    return Section("rates", "Learning rates", [*blocks, _choices(facts)])


def failures(facts: StudyFacts) -> Section | None:
    """The runs that failed, each with its reason; None without any."""
    rows = [
        [
            words(cell.arm),
            words(cell.phase),
            rate(cell.learning_rate),
            count(cell.seed),
            count(cell.attempt),
            words(cell.reason),
        ]
        for cell in facts.failures()
    ]
    if not rows:
        return None
    columns = ["arm", "phase", "rate", "seed", "attempts", "reason"]
    note = "A rate that diverged counts as worse than all others and closes its side of the sweep."
    return Section("failed", "Failed runs", [Table("failed-runs", "Runs that failed", columns, rows, note)])


def _figure(facts: StudyFacts, tried: list[CellRecord]) -> Figure | None:
    base = facts.base_losses.get("selection", math.inf)
    good = [cell for cell in tried if cell.loss is not None and cell.loss < base and math.isfinite(cell.loss)]
    if not good:
        return None
    top = Axis.around("", [cell.loss for cell in good if cell.loss is not None]).high
    series, chosen = [], []
    for arm in facts.study.arms:
        points = _means(cell for cell in good if cell.arm == arm.name)
        if not points:
            continue
        rings = [(at, loss) for at, loss in points if at == arm.chosen_rate]
        series.append(Series(arm.name, points, facts.styles[arm.name], rings=rings))
        chosen += [f"{arm.name} {rate(arm.chosen_rate).text}"] if arm.chosen_rate is not None else []
    bad = sorted({cell.learning_rate for cell in tried if cell not in good})
    if bad:
        series.append(Series("failed or diverged", [(at, top) for at in bad], style=4, has_line=False))
    x = Axis.around("learning rate, in terms of full fine-tuning", [cell.learning_rate for cell in tried], is_log=True)
    y = Axis.around("loss on the selection rows, nats", [value for each in series for _, value in each.points])
    says = f"Chosen, with a ring: {', '.join(chosen)}." if chosen else "No rate is chosen yet."
    says += " Rates that failed or diverged are at the top." if bad else ""
    return line_chart("u-curves", "Loss against learning rate", says, x, y, series)


def _means(cells: Iterable[CellRecord]) -> list[tuple[float, float]]:
    """Learning rates with the mean loss over selection seeds."""
    losses: dict[float, list[float]] = defaultdict(list)
    for cell in cells:
        losses[cell.learning_rate].append(cell.loss or 0.0)
    return [(at, fmean(found)) for at, found in sorted(losses.items())]


def _choices(facts: StudyFacts) -> Table:
    rows = []
    for arm in facts.study.arms:
        tried = facts.study.cells_of(arm.name, "selection")
        losses = [cell.loss for cell in tried if cell.loss is not None and math.isfinite(cell.loss)]
        why = f"{arm.why}; {arm.problem}" if arm.problem and arm.problem not in arm.why else arm.why
        rows.append(
            [
                words(arm.name),
                rate(arm.chosen_rate),
                Cell(str(len(tried)), len(tried)),
                nats(min(losses, default=None)),
                words(why),
            ]
        )
    columns = ["arm", "chosen rate", "runs", "lowest loss", "why"]
    note = "The lowest loss of a sweep was picked from several and is too good for that: verdicts use fresh seeds."
    return Table("chosen-rates", "Chosen learning rates", columns, rows, note)
