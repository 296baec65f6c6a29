"""Rank and capacity: the difference of each rank, what its parameters have to hold, and its layers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lightning_lora.study.matched.record import ArmRecord
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Figure, Section, Table
from lightning_lora.study.report.numbers import count, difference, share, short, words
from lightning_lora.study.report.runs.capacity_panel import layer_map
from lightning_lora.study.report.studies.arm_settings import besides, rank_of
from lightning_lora.study.report.studies.study_facts import StudyFacts

PLAN = "plan.json"
_MOST_MAPS = 6


def study_capacity(facts: StudyFacts) -> Section | None:
    """The panel; None without adapters of a known rank."""
    ranks = {arm.name: rank for arm in facts.study.arms if (rank := rank_of(arm)) is not None}
    if not ranks:
        return None
    blocks: list[Block] = [figure] if (figure := _by_rank(facts, ranks)) else []
    blocks += [_table(facts, ranks), *_maps(facts)]
    return Section("capacity", "Rank and capacity", blocks)


def _by_rank(facts: StudyFacts, ranks: Mapping[str, int]) -> Figure | None:
    """Differences against the rank, a line for arms that differ in nothing else."""
    lines: dict[str, list[tuple[float, Mapping[str, Any], ArmRecord]]] = defaultdict(list)
    for arm in facts.study.arms:
        verdict = facts.verdicts.get(arm.name)
        if arm.name in ranks and verdict and None not in (verdict["difference"], verdict["low"], verdict["high"]):
            lines[besides(arm, "rank")].append((float(ranks[arm.name]), verdict, arm))
    points = sorted((point for line in lines.values() for point in line), key=lambda point: point[0])
    if len({rank for rank, _, _ in points}) < 2:
        return None
    series = []
    for number, line in enumerate(lines.values()):
        line.sort(key=lambda point: point[0])
        means, low, high = ([float(verdict[name]) for _, verdict, _ in line] for name in ("difference", "low", "high"))
        places = [rank for rank, _, _ in line]
        name = ("difference" if number == 0 else "") if len(lines) == 1 else " / ".join(arm.name for _, _, arm in line)
        series.append(Series(name, list(zip(places, means, strict=True)), number, low=low, high=high))
    ends = [end for each in series for end in (*each.low, *each.high)]
    places = [rank for rank, _, _ in points]
    x = Axis.around("rank", places, is_log=True).marked(places)
    y = Axis.around(f"nats above {facts.study.baseline}", [*ends, -facts.band, facts.band])
    told = ", ".join(f"{arm.name} {difference(verdict['difference']).text}" for _, verdict, arm in points)
    says = f"In nats: {told}. Dotted lines: differences between them count as none."
    title = "Difference by rank, with its interval"
    return line_chart("by-rank", title, says, x, y, series, limits=(-facts.band, facts.band))


def _table(facts: StudyFacts, ranks: Mapping[str, int]) -> Table:
    planned = _planned(facts)
    watched = {name: facts.watched.get(name) for name in ranks}
    rows = []
    for name, rank in ranks.items():
        runs = facts.verdict_runs(name) or [cell for cell in facts.study.cells_of(name) if cell.state == "done"]
        run = runs[0] if runs else None
        told = watched[name]
        capacity = (told[1].last_of("capacity_verdict") if told else None) or {}
        measured = (told[1].last_of("capacity") if told else None) or {}
        plan = planned.get(rank, {})
        row = [
            words(name),
            count(rank),
            count(run.trained_parameters if run else None),
            short(run.tokens / run.trained_parameters if run and run.tokens and run.trained_parameters else None),
        ]
        if planned:
            row += [short(plan.get("ratio_a")), short(plan.get("ratio_b")), words(str(plan.get("verdict") or "-"))]
        if any(watched.values()):
            row += [
                words(str(capacity.get("verdict") or "-").lower()),
                share(measured.get("capacity/truncation")),
                short(measured.get("capacity/capture")),
            ]
        rows.append(row)
    columns = ["arm", "rank", "trained parameters", "trained tokens per parameter"]
    columns += ["plan: tokens per parameter", "plan: bits needed / room", "plan says"] if planned else []
    columns += ["monitor says", "gain lost at half rank", "tangent capture"] if any(watched.values()) else []
    note = "Tokens count once for each time they are trained on; rows, where batches have no tokens."
    if planned:
        note += f" The plan's ratios ({PLAN}) count each token once; they are upper bounds of what is needed."
    if not any(watched.values()):
        note += " CapacityMonitor in the runs would tell what of the rank is used."
    return Table("ranks", "What the adapters have to hold", columns, rows, note)


def _planned(facts: StudyFacts) -> dict[int, Mapping[str, Any]]:
    """Rank to its line in the plan that lies in the study folder or beside a run; empty without one."""
    for folder in (facts.study.folder, *(facts.study.run_folder(cell) for cell in facts.study.cells)):
        if (folder / PLAN).is_file():
            try:
                found = json.loads((folder / PLAN).read_text(encoding="utf-8"))["capacity"]
                return {int(row["rank"]): row for row in found}
            except (ValueError, KeyError, TypeError, RecursionError):  # not one of ours
                continue
    return {}


def _maps(facts: StudyFacts) -> list[Block]:
    """The layers of each arm that was watched, the main one open, the others folded."""
    blocks: list[Block] = []
    order = sorted(facts.watched, key=lambda name: name != facts.study.primary)
    for number, name in enumerate(order[:_MOST_MAPS]):
        seed, run = facts.watched[name]
        verdict = run.last_of("capacity_verdict")
        if verdict and verdict.get("groups"):
            caption = f"Layers by role of {name}, seed {seed}"
            blocks.append(layer_map(verdict["groups"], caption, f"layers-{number}", is_folded=bool(blocks)))
    return blocks
