"""What a `CapacityMonitor`, a `RankGrowth` or a `RankProbe` has found about the room of the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.capacity.reading import FULL_BELOW, IDLE_BELOW, SPARE_BELOW
from lightning_lora.study.rank_probe_result import RankProbeResult
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.heat_map import heat_cell, heat_map
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Cell, Figure, Listing, Section, Table, Words, said
from lightning_lora.study.report.numbers import count, nats, share, words
from lightning_lora.study.report.runs.run_record import RunRecord

_LOST, _CAPTURE, _EFFECTIVE, _SHARE = (
    "gain lost at half rank",
    "tangent capture",
    "effective rank / rank",
    "share of gain",
)


def capacity_panel(run: RunRecord) -> Section | None:
    """The panel; None if nothing watched the capacity."""
    measured = _since_last_start(run)
    blocks: list[Block] = []
    if verdict := run.last_of("capacity_verdict"):
        blocks.append(Words(str(verdict["sentence"])[:1].upper() + str(verdict["sentence"])[1:]))
    elif measured:
        last = measured[-1]
        blocks.append(said("So far: {word}.", word=words(str(last["verdict"]))))
    blocks += [
        figure for figure in (_truncation(measured), _capture(measured), _losses(measured)) if figure is not None
    ]
    if verdict and verdict.get("groups"):
        blocks.append(layer_map(verdict["groups"]))
    if growths := run.all_of("rank_growth"):
        blocks.append(_growth(growths))
    if run.rank_probe:
        blocks += _probe(run.rank_probe)
    return Section("capacity", "Rank and capacity", blocks) if blocks else None


def _since_last_start(run: RunRecord) -> list[Mapping[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for event in run.all_of("capacity"):
        # Measurements of one step come one by one.
        found[event["step"]] = {**found.get(event["step"], {}), **event}
    return [found[step] for step in sorted(found)]


def _curve(measured: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [(float(each["step"]), each.get(f"capacity/{name}")) for each in measured]
    return [(step, float(value)) for step, value in points if value is not None]


def _truncation(measured: Sequence[Mapping[str, Any]]) -> Figure | None:
    lost = _curve(measured, "truncation")
    if not lost:
        return None
    series = [Series(_LOST, lost), Series("spare below", [(at, SPARE_BELOW) for at, _ in (lost[0], lost[-1])], style=7)]
    x = Axis.around("optimizer step", [at for each in series for at, _ in each.points])
    y = Axis.around("share", [0.0, *(value for each in series for _, value in each.points)])
    says = (
        f"Half of the rank loses {share(lost[-1][1]).text} of what the adapters gained, at step "
        f"{count(lost[-1][0]).text}; below {share(SPARE_BELOW, 0).text} the rank is spare."
    )
    return line_chart("capacity-shares", "Share of the gain that is lost at half of the rank", says, x, y, series)


def _capture(measured: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Tangent capture with its interval, where it was measured more than once."""
    known = [each for each in measured if each.get("capacity/capture_high") is not None]
    if len(known) < 2:
        return None
    points, low, high = (_curve(known, name) for name in ("capture", "capture_low", "capture_high"))
    ends = [[end for _, end in each] for each in (low, high)]
    limit = [(at, FULL_BELOW) for at, _ in (points[0], points[-1])]
    series = [Series(_CAPTURE, points, low=ends[0], high=ends[1]), Series("full below", limit, style=7)]
    x = Axis.around("optimizer step", [at for at, _ in points])
    y = Axis.around("share", [*ends[0], *ends[1], FULL_BELOW, 1.0])
    says = (
        f"Tangent capture is {_two_places(points[-1][1]).text} ({_two_places(low[-1][1]).text} to "
        f"{_two_places(high[-1][1]).text}) at step {count(points[-1][0]).text}; full adapters stay below {FULL_BELOW}."
    )
    return line_chart("capacity-capture", "How much of the gradient the adapters can follow", says, x, y, series)


def _losses(measured: Sequence[Mapping[str, Any]]) -> Figure | None:
    names = {"bare_loss": "without adapters", "half_loss": "half of the rank", "loss": "whole rank"}
    series = [
        Series(shown, points, style=style)
        for style, (name, shown) in enumerate(names.items())
        if len(points := _curve(measured, name)) > 1
    ]
    if not series:
        return None
    x = Axis.around("optimizer step", [at for each in series for at, _ in each.points])
    y = Axis.around("loss", [value for each in series for _, value in each.points])
    ends = ", ".join(f"{each.name} {nats(each.points[-1][1]).text}" for each in series)
    return line_chart(
        "capacity-losses", "Loss with all, half and none of the update", f"At the end: {ends}.", x, y, series
    )


def layer_map(
    groups: Mapping[str, Mapping[str, Any]],
    caption: str = "Layers by role",
    name: str = "layers",
    is_folded: bool = False,
) -> Table:
    """A heat map of the groups of layers of a capacity verdict."""

    def shown(group: Mapping[str, Any]) -> dict[str, Cell]:
        rank = group.get("rank")
        return {
            "state": words(group.get("state") or "?", f"state-{group.get('state') or 'open'}"),
            _LOST: heat_cell(group.get("truncation"), 0.5, _percent),
            _CAPTURE: heat_cell(group.get("capture"), 1.0, _two_places),
            _EFFECTIVE: heat_cell(group["effective_rank"] / rank if rank else None, 1.0, _two_places),
            _SHARE: heat_cell(group.get("share"), 0.5, _percent),
        }

    cells = {name: shown(group) for name, group in groups.items()}
    measures = ["state", _LOST, _CAPTURE, _EFFECTIVE, _SHARE]
    measures = [each for each in measures if any(not _is_empty(group[each]) for group in cells.values())]
    note = (
        f"Spare: half of the rank loses less than {SPARE_BELOW:.0%} of the group's gain. Full: it loses more, and "
        f"tangent capture is certainly below {FULL_BELOW}. Idle: the group gives less than {IDLE_BELOW:.0%} of the "
        "gain. The effective rank describes an update and decides nothing. A question mark: not measured, or not told "
        "from noise."
    )
    return heat_map(name, caption, cells, measures, note, is_folded)


def _percent(value: float) -> Cell:
    return share(value, 0)


def _two_places(value: float) -> Cell:
    return Cell(f"{value:.2f}", value)


def _is_empty(cell: Cell) -> bool:
    return cell.text == "?" or (isinstance(cell.value, float) and not math.isfinite(cell.value))


def _growth(growths: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["step", "layers", "rank before", "rank after", "parameters"]
    rows = [
        [
            count(each["step"]),
            words(str(each["group"])),
            words(_ranks(each["before"])),
            words(_ranks(each["after"])),
            count(each["parameters"]),
        ]
        for each in growths
    ]
    return Table("rank-growth", "Ranks that grew", columns, rows)


def _ranks(by_weight: Mapping[str, int]) -> str:
    """The different ranks of the weights of a group."""
    return ", ".join(map(str, sorted(set(by_weight.values()))))


def _probe(probe: RankProbeResult) -> list[Block]:
    tried = ((probe.rank, probe.control_loss), (probe.grown_rank, probe.grown_loss))
    rows = [[count(rank), nats(loss)] for rank, loss in tried]
    return [
        Table("rank-probe", "Ranks tried by a probe", ["rank", "held-out loss"], rows),
        Listing("The probe", str(probe)),
    ]
