"""The batch: losses against rows per step, whether a large batch costs adapters more, and what monitors say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import takewhile
from statistics import fmean
from typing import Any

from lightning_lora.study.matched.record import ArmRecord
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Figure, Section, Table, Words
from lightning_lora.study.report.numbers import count, difference, nats, short, word_cell, words
from lightning_lora.study.report.studies.arm_settings import besides, rows_of
from lightning_lora.study.report.studies.study_facts import StudyFacts, why_open, with_interval

_ENDS = " ,:;-_/("
_UNKNOWN = "Cannot tell whether a large batch costs adapters more than full fine-tuning"


def study_batch(facts: StudyFacts) -> Section | None:
    """The panel; None where all arms have one batch and nothing watched it."""
    blocks: list[Block] = []
    if (penalty := facts.study.batch_penalty) is not None:
        blocks.append(_penalty(penalty))
    if figure := _by_batch(facts):
        blocks.append(figure)
    if any(run.last_of("noise_scale") for _, run in facts.watched.values()):
        blocks.append(_monitors(facts))
    return Section("batch", "Batch size", blocks) if blocks else None


def _penalty(penalty: Mapping[str, Any]) -> Words:
    """The difference of differences in words."""
    cells = {name: difference(penalty[name]) for name in ("difference", "low", "high") if penalty[name] is not None}
    text, why = str(penalty["sentence"]), why_open(penalty)
    text = (
        f"{_UNKNOWN}{why and f': {why}'}." if penalty["verdict"] == "cannot tell" else f"{text[:1].upper()}{text[1:]}."
    )
    if penalty["difference"] is not None:
        text += f" Difference of differences, nats: {with_interval(penalty)}, {word_cell(penalty).text}."
    return Words(text, cells)


def _by_batch(facts: StudyFacts) -> Figure | None:
    lines: dict[str, list[tuple[int, ArmRecord]]] = defaultdict(list)
    for arm in facts.study.arms:
        rows = rows_of(arm) or _measured_rows(facts, arm.name)
        if rows is not None and facts.losses(arm.name).means():
            lines[besides(arm, "batch")].append((rows, arm))
    lines = {key: sorted(line, key=lambda point: point[0]) for key, line in lines.items()}
    lines = {key: line for key, line in lines.items() if len({rows for rows, _ in line}) > 1}
    if not lines:
        return None
    series, told, numbers = [], [], []
    for line in lines.values():
        name = _common_name([arm.name for _, arm in line])
        losses = [list(facts.losses(arm.name).means().values()) for _, arm in line]
        means = [fmean(each) for each in losses]
        points = [(float(rows), mean) for (rows, _), mean in zip(line, means, strict=True)]
        low, high = [min(each) for each in losses], [max(each) for each in losses]
        series.append(Series(name, points, facts.styles[line[0][1].name], low=low, high=high))
        told.append(f"{name} {', '.join(f'{nats(mean).text} at {rows:g}' for rows, mean in points)}")
        numbers += [
            [words(arm.name), count(rows), nats(fmean(each)), nats(min(each)), nats(max(each)), count(len(each))]
            for (rows, arm), each in zip(line, losses, strict=True)
        ]
    places = [at for each in series for at, _ in each.points]
    x = Axis.around("rows per optimizer step", places, is_log=True).marked(places)
    y = Axis.around("loss on the verdict rows, nats", [end for each in series for end in (*each.low, *each.high)])
    columns = ["arm", "rows per step", "loss", "best seed", "worst seed", "seeds"]
    table = Table("batches", "Losses by batch size", columns, numbers)
    says = f"{'; '.join(told)}. The area goes from the best seed to the worst."
    return line_chart("by-batch", "Loss against batch size", says, x, y, series, table)


def _measured_rows(facts: StudyFacts, arm: str) -> int | None:
    """Rows per step as a monitor has counted them."""
    event = facts.watched[arm][1].last_of("batch") if arm in facts.watched else None
    return event.get("batch/rows") if event else None


def _common_name(names: list[str]) -> str:
    """What names have in common at their start, or all of them."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same).rstrip(_ENDS).removesuffix("batch").rstrip(_ENDS)
    return common or " / ".join(names)


def _monitors(facts: StudyFacts) -> Table:
    rows = []
    for name, (seed, run) in facts.watched.items():
        sample = run.last_of("noise_scale")
        if sample:
            known = sample.get("gns/low") is not None
            rows.append(
                [
                    words(name),
                    count(seed),
                    words(str(sample["state"])),
                    *(short(sample.get(f"gns/{each}") if known else None) for each in ("value", "low", "high")),
                    count(sample["batch/rows"]),
                ]
            )
    columns = ["arm", "seed", "batch", "noise scale, rows", "low", "high", "rows per step"]
    note = "Each line is one seed at the end of its run. A noise scale is told where it has an interval."
    return Table("monitors", "What BatchSizeMonitor has said", columns, rows, note)
