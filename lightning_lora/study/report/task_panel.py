"""What lm-eval has found of the models of a study or run: scores on tasks, and their differences by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_lora.study.report.charts.interval_chart import Difference, interval_chart
from lightning_lora.study.report.content import Block, Cell, Figure, Section, Table, Words, said
from lightning_lora.study.report.numbers import NOTHING, count, p_value, share, word_cell, words
from lightning_lora.study.tasks.record import read_tasks


def task_panel(folder: Path, styles: Mapping[str, int], primary: str = "") -> Section | None:
    """The panel; None if nothing was evaluated.

    Args:
        styles: Arm to the number of its colour.
        primary: The arm that the axis of a chart is made for; "" for all.
    """
    found = read_tasks(folder)
    if found is None:
        return None
    verdicts = found["verdicts"]
    blocks: list[Block] = [Words(f"{_sentence(each)}.", _numbers(each)) for each in verdicts]
    names = list(dict.fromkeys((each["task"], each["metric"]) for each in verdicts))
    for number, name in enumerate(names):
        of_task = [each for each in verdicts if (each["task"], each["metric"]) == name]
        if figure := _figure(number, name, of_task, styles, primary):
            blocks.append(figure)
    return Section("tasks", "Tasks", [*blocks, _scores(found["scores"]), _settings(found)])


def _sentence(verdict: Mapping[str, Any]) -> str:
    text = str(verdict["sentence"])
    return f"C{text[1:]}" if text.startswith("cannot tell") else text


def _points(value: float | None) -> Cell:
    """A share of the questions as points, with its sign."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f}"
    return Cell(text if float(text) else text[1:], 100 * value)


def _told(band: float) -> str:
    """A band in words."""
    return f"{100 * band:g} point{'' if band == 0.01 else 's'}"


def _numbers(verdict: Mapping[str, Any]) -> dict[str, Cell]:
    known = {name: verdict[name] for name in ("difference", "low", "high") if verdict[name] is not None}
    return {name: _points(value) for name, value in known.items()}


def _with_interval(verdict: Mapping[str, Any]) -> str:
    mean, low, high = (_points(verdict[name]).text for name in ("difference", "low", "high"))
    return f"{mean} ({low} to {high})"


def _figure(
    number: int, name: tuple[str, str], verdicts: Sequence[Mapping[str, Any]], styles: Mapping[str, int], primary: str
) -> Figure | None:
    known = [each for each in verdicts if each["difference"] is not None]
    if not known:
        return None
    rows = [
        Difference(
            each["arm"],
            word_cell(each).text,
            100 * each["difference"],
            -math.inf if each["low"] is None else 100 * each["low"],
            math.inf if each["high"] is None else 100 * each["high"],
            styles.get(each["arm"], 0),
            _with_interval(each),
            primary in ("", each["arm"]),
        )
        for each in known
    ]
    baseline, where = known[0]["baseline"], f"{name[0]}, {name[1]}"
    says = "; ".join(f"{each['arm']} {_with_interval(each)}, {word_cell(each).text}" for each in known)
    title = f"Score of each arm minus that of {baseline}: {where}"
    label = f"points above {baseline}: more is better"
    return interval_chart(
        f"task-{number}", title, f"{says}.", label, rows, 100 * known[0]["band"], _table(number, where, known)
    )


def _table(number: int, where: str, verdicts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            words(each["arm"]),
            word_cell(each),
            *(_points(each[name]) for name in ("difference", "low", "high")),
            *(count(each[name]) for name in ("seeds", "questions")),
            *(p_value(each[name]) for name in ("p", "p_corrected")),
        ]
        for each in verdicts
    ]
    columns = ["arm", "verdict", "points", "low", "high", "seeds", "questions", "p", "p, corrected"]
    return Table(f"task-numbers-{number}", f"Differences in points: {where}", columns, rows)


def _scores(scores: Sequence[Mapping[str, Any]]) -> Table:
    by_row: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for each in scores:
        by_row.setdefault((each["arm"], each["task"], each["metric"]), []).append(each)
    rows = [
        [
            words(arm),
            words(task),
            words(metric),
            share(fmean(each["score"] for each in found)),
            share(min(each["score"] for each in found)),
            share(max(each["score"] for each in found)),
            count(None if found[0]["seed"] is None else len(found)),
            count(found[0]["questions"]),
        ]
        for (arm, task, metric), found in by_row.items()
    ]
    columns = ["arm", "task", "metric", "score", "lowest seed", "highest seed", "seeds", "questions"]
    return Table("task-scores", "Scores, mean over seeds", columns, rows)


def _settings(found: Mapping[str, Any]) -> Words:
    settings = found["settings"]
    limit, examples = settings["limit"], settings["num_fewshot"]
    text = "Scored by lm-eval {version} with {limit} and {examples}, {chat} a chat template; the same for all models."
    text += " Differences below {band} count as none; questions and seeds are both taken as random."
    text += " Programs that the models wrote were run." if settings["allow_code_execution"] else ""
    asked = (
        "all questions" if limit is None else f"{limit:g} questions a task" if limit >= 1 else f"{limit:.0%} of them"
    )
    return said(
        text,
        version=words(str(found["lm_eval"])),
        limit=words(asked),
        examples=words("the task's own examples" if examples is None else f"{examples} worked examples"),
        chat=words("with" if settings["chat_template"] else "without"),
        band=Cell(_told(settings["band"]), settings["band"]),
    )
