"""The report of a few runs side by side that are no study: one seed each, and no verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Cell, Figure, Page, Section, Table, Words, said
from lightning_lora.study.report.numbers import nats, words


@dataclass(frozen=True)
class Beside:
    """One of the runs.

    Args:
        train: Training loss by optimizer step.
        validation: Validation loss by optimizer step.
        facts: Columns of the table, such as ``"time"``.
    """

    name: str
    train: Mapping[int, float]
    validation: Mapping[int, float]
    facts: Mapping[str, Cell] = field(default_factory=dict)


def side_by_side_page(subject: str, runs: Sequence[Beside], remarks: Sequence[str]) -> Page:
    """All that is told of the runs."""
    ends = {run.name: run.validation[max(run.validation)] for run in runs}
    best = min(ends, key=lambda name: ends[name])
    others = ", ".join(f"{nats(loss).text} with {name}" for name, loss in ends.items() if name != best)
    cells = {f"loss of {name}": nats(loss) for name, loss in ends.items()}
    verdict = Words(f"Validation loss {nats(ends[best]).text} nats with {best}, {others}: one seed each", cells)
    rows = [
        [words(run.name), nats(run.validation[min(run.validation)]), nats(ends[run.name]), *run.facts.values()]
        for run in runs
    ]
    columns = ["run", "loss before", "loss after", *runs[0].facts]
    table = Table("runs", "The runs, losses in nats per supervised token", columns, rows)
    sections = [
        Section("runs-part", "The runs", [table, *(Words(remark) for remark in remarks)]),
        Section("loss", "Loss", [_chart(runs, verdict.text)]),
        Section("limits", "What this does not show", [_limits(len(runs))]),
    ]
    return Page(subject, verdict, [], sections)


def _chart(runs: Sequence[Beside], says: str) -> Figure:
    series = []
    for style, run in enumerate(runs):
        series.append(Series(run.name, sorted(run.train.items()), style, is_thin=True))
        series.append(Series(run.name, sorted(run.validation.items()), style))
    x = Axis.around("optimizer step", [at for each in series for at, _ in each.points], margin=0.02)
    y = Axis.around("loss, nats", [loss for each in series for _, loss in each.points])
    says = f"{says}. Thick lines with marks are validation, thin ones the training loss of each step."
    return line_chart("losses", "Loss against steps", says, x, y, series)


def _limits(count: int) -> Words:
    return said(
        "These are {count} runs with one seed each, at rates that were chosen before: another seed gives other "
        "numbers, and a difference may be chance. lightning-lora study compares several seeds, and gives a verdict.",
        count=Cell(str(count), count),
    )
