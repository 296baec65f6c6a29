"""Loss curves of a run against steps, tokens and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Choice, Figure, Section, Words
from lightning_lora.study.report.runs.losses import smoothed
from lightning_lora.study.report.runs.run_record import RunRecord
from lightning_lora.study.report.runs.run_summary import loss_unit, run_verdict

_LONG = 50
"""Steps above which their axis is logarithmic."""


def run_curves(run: RunRecord) -> Section | None:
    """The curves; None if no loss was logged."""
    losses = run.losses
    if not losses.train and not losses.validation:
        return None
    figures = [_figure(run, "steps", "optimizer step", float)]
    for number, (name, label) in enumerate(
        (("tokens", "supervised tokens trained on"), ("seconds", "seconds of training"))
    ):
        places = {step: effort[number] for step, effort in losses.effort.items() if effort[number] > 0}
        if len(places) > 1:
            figures.append(_figure(run, name, label, places.get))
    note = [] if len(figures) > 1 else [Words("Tokens and seconds were not recorded with these losses.", {}, "note")]
    return Section("loss", "Loss", [Choice("losses", figures), *note])


def _figure(run: RunRecord, name: str, label: str, place: Callable[[int], float | None]) -> Figure:
    losses = run.losses
    train, validation = (_placed(each, place) for each in (losses.train, losses.validation))
    series = []
    if train:
        values = tuple(value for _, value in train)
        even = [(at, float(value)) for (at, _), value in zip(train, smoothed(values), strict=True)]
        series += [Series("training", train, is_thin=True), Series("training", even)]
    if validation:
        series.append(Series("validation", validation, style=1))
    places = [at for each in series for at, _ in each.points]
    x = Axis.around(label, places, is_log=len(places) > _LONG, margin=0.02)
    y = Axis.around(
        f"loss,{loss_unit(run)}" if loss_unit(run) else "loss", [value for each in series for _, value in each.points]
    )
    title = f"Loss against {name}"
    says = f"{run_verdict(run).text}."
    if train:
        says += " The thin line is the training loss of each step, the thick one its mean over neighbours."
    return line_chart(f"loss-{name}", title, says, x, y, series, choice=name)


def _placed(losses: Mapping[int, float], place: Callable[[int], float | None]) -> list[tuple[float, float]]:
    found = [(place(step), loss) for step, loss in sorted(losses.items())]
    return [(at, loss) for at, loss in found if at is not None and math.isfinite(loss)]
