"""The learning-rate sweeps: one U for each arm, the chosen rate, and what a smaller sweep would have found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

from lightning_lora.study.matched.record import CellRecord
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Cell, Figure, Section, Table
from lightning_lora.study.report.numbers import nats, rate, words
from lightning_lora.study.report.studies.study_facts import StudyFacts


def study_rates(facts: StudyFacts) -> Section | None:
    """The sweeps; None before the first of their runs is over."""
    tried = [cell for cell in facts.study.cells if cell.phase == "selection" and cell.state in ("done", "failed")]
    if not tried:
        return None
    figure = _figure(facts, tried)
    blocks: list[Block] = [figure] if figure else []
    return Section("rates", "Learning rates", [*blocks, _choices(facts), *_expected(facts)])


def _figure(facts: StudyFacts, tried: list[CellRecord]) -> Figure | None:
    base = facts.base_losses.get("selection", math.inf)
    good = [cell for cell in tried if cell.loss is not None and cell.loss < base and math.isfinite(cell.loss)]
    if not good:
        return None
    top = Axis.around("", [cell.loss for cell in good if cell.loss is not None]).high
    series, chosen, wanting, failed = [], [], [], []
    for arm in facts.study.arms:
        points = _means(cell for cell in good if cell.arm == arm.name)
        bad = sorted({cell.learning_rate for cell in tried if cell not in good and cell.arm == arm.name})
        if not points and not bad:
            continue
        rings = [(at, loss) for at, loss in points if at == arm.chosen_rate and not arm.problem]
        edges = [min(points, key=lambda point: point[1])] if points and arm.problem else []
        crosses = [(at, top) for at in bad]
        style = facts.styles[arm.name]
        series.append(Series(arm.name, points, style, rings=rings, edges=edges, crosses=crosses))
        chosen += [f"{arm.name} {rate(arm.chosen_rate).text}"] if arm.chosen_rate is not None else []
        wanting += [arm.name] if edges else []
        failed += [f"{arm.name} {', '.join(rate(at).text for at in bad)}"] if bad else []
    x = Axis.around("learning rate, in terms of full fine-tuning", [cell.learning_rate for cell in tried], is_log=True)
    heights = [value for each in series for _, value in [*each.points, *each.crosses]]
    y = Axis.around("loss on the selection rows, nats", heights)
    says = f"Chosen, with a ring: {', '.join(chosen)}." if chosen else "No rate is chosen yet."
    says += f" A dashed ring: the best rate cannot carry a verdict ({', '.join(wanting)})." if wanting else ""
    says += f" Crosses at the top: failed or diverged, {'; '.join(failed)}." if failed else ""
    return line_chart("u-curves", "Loss against learning rate", says, x, y, series)


def _expected(facts: StudyFacts) -> list[Table]:
    """What somebody would have found who tries fewer of the rates."""
    known = {arm.name: arm.expected_best for arm in facts.study.arms if arm.expected_best}
    if not known:
        return []
    most = max(map(len, known.values()))
    rows = [
        [words(name), *(nats(found[at] if at < len(found) else None) for at in range(most))]
        for name, found in known.items()
    ]
    columns = ["arm", *(f"{budget} rate{'s' if budget > 1 else ''}" for budget in range(1, most + 1))]
    note = (
        "The expected lowest loss on the selection rows if so many of the sweep's rates are tried, drawn at random; a "
        "diverged rate counts with the loss of the untrained base. It describes this sweep only."
    )
    return [Table("expected-best", "Expected best of a smaller sweep", columns, rows, note)]


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
