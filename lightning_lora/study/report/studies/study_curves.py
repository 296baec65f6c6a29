"""Validation losses of all arms against steps, tokens and seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from lightning_lora.study.matched.record import CellRecord, CurvePoint
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Choice, Figure, Section, Words
from lightning_lora.study.report.numbers import nats
from lightning_lora.study.report.studies.study_facts import StudyFacts
from lightning_lora.study.report.studies.study_steps import steps_table
from lightning_lora.study.statistics.rates.over_rates import envelope

_PLACES = (("steps", "optimizer step"), ("tokens", "supervised tokens trained on"), ("seconds", "seconds of training"))
_Curve = Sequence[CurvePoint]


def study_curves(facts: StudyFacts) -> Section | None:
    """The curves of the verdict runs; of the selection runs at the best rate as long as there are none."""
    curves = {arm.name: _curves(facts, arm.name) for arm in facts.study.arms}
    if not any(curves.values()):
        return None
    figures = [_figure(facts, curves, name, label) for name, label in _PLACES]
    note = "Thin lines are single seeds, the thick one is their mean, at steps that all seeds have."
    waiting = [arm for arm, found in curves.items() if found and not facts.verdict_runs(arm)]
    note += f" {', '.join(waiting)}: the best selection run, as there is no verdict run yet." if waiting else ""
    if figures[0].off:
        note += " Envelopes, off at first, are made of the selection runs: they lie below any run and judge nothing."
    blocks = [Choice("curve-choice", figures), Words(note, {}, "note"), *steps_table(facts)]
    return Section("curves", "Validation loss", blocks)


def _curves(facts: StudyFacts, arm: str) -> list[_Curve]:
    runs: list[CellRecord] = facts.verdict_runs(arm)
    if not runs:
        done = [cell for cell in facts.study.cells_of(arm, "selection") if cell.loss is not None]
        runs = sorted((cell for cell in done if math.isfinite(cell.loss or 0)), key=lambda cell: cell.loss or 0)[:1]
    found = ([point for point in facts.study.curve(run) if point.val_loss is not None] for run in runs)
    return [curve for curve in found if curve]


def _figure(facts: StudyFacts, curves: dict[str, list[_Curve]], name: str, label: str) -> Figure:
    series, ends = [], []
    for arm, seeds in curves.items():
        thin = [[(_place(point, name), point.val_loss or 0.0) for point in curve] for curve in seeds]
        style = facts.styles[arm]
        series += [Series(arm, points, style, is_thin=True) for points in thin if len(thin) > 1]
        if mean := _mean(seeds, name):
            series.append(Series(arm, mean, style))
            ends.append(f"{arm} {nats(mean[-1][1]).text}")
    series += _envelopes(facts) if name == "steps" else []
    places = [at for each in series for at, _ in each.points]
    x = Axis.around(label, places, is_log=True, margin=0.02)
    y = Axis.around("validation loss, nats", [loss for each in series for _, loss in each.points])
    return line_chart(
        f"curve-{name}", f"Validation loss against {name}", f"At the end: {', '.join(ends)}.", x, y, series, choice=name
    )


def _envelopes(facts: StudyFacts) -> list[Series]:
    """The lowest loss over the rates of a sweep at each step, for each arm with two rates or more."""
    series = []
    for arm in facts.study.arms:
        curves: dict[float, dict[int, float]] = {}
        for cell in facts.study.cells_of(arm.name, "selection"):
            if cell.state == "done" and cell.learning_rate not in curves:
                points = facts.study.curve(cell)
                curves[cell.learning_rate] = {each.step: each.val_loss for each in points if each.val_loss is not None}
        curves = {rate: curve for rate, curve in curves.items() if curve}
        steps = sorted(set.intersection(*map(set, curves.values()))) if len(curves) > 1 else []
        if steps:
            lowest = envelope({rate: [curve[step] for step in steps] for rate, curve in curves.items()})
            points = [(float(step), float(loss)) for step, loss in zip(steps, lowest.losses, strict=True)]
            name = f"{arm.name}: {lowest.legend}"
            series.append(Series(name, points, facts.styles[arm.name], is_thin=True, is_off=True))
    return series


def _place(point: CurvePoint, name: str) -> float:
    return float({"steps": point.step, "tokens": point.tokens, "seconds": point.seconds}[name])


def _mean(curves: Sequence[_Curve], name: str) -> list[tuple[float, float]]:
    """The mean curve: over the seeds at each step that all of them have; tokens and seconds are means too."""
    by_step: dict[int, list[CurvePoint]] = defaultdict(list)
    for curve in curves:
        for point in curve:
            by_step[point.step].append(point)
    return [
        (fmean(_place(point, name) for point in points), fmean(point.val_loss or 0.0 for point in points))
        for _, points in sorted(by_step.items())
        if len(points) == len(curves)
    ]
