"""What happened during a run: starts, ends, changed batches, losses that are no numbers; and the plan beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_lora.study.report.content import Cell, Section, Table, Words
from lightning_lora.study.report.numbers import NOTHING, count, seconds, share, size, words
from lightning_lora.study.report.runs.run_record import RunRecord

_PLANNED = {
    "steps": ("optimizer steps", count),
    "tokens": ("supervised tokens", count),
    "total_tokens": ("all tokens", count),
    "trained_parameters": ("trained parameters", count),
    "peak_bytes": ("peak memory", size),
    "seconds": ("seconds", seconds),
}


def planned_and_measured(run: RunRecord) -> Section | None:
    """What the run was planned to take beside what it took; None without a plan."""
    event = run.last_of("planned_and_measured")
    if event is None or not any(value is not None for value in event["planned"].values()):
        return None
    rows = []
    for name, (shown, form) in _PLANNED.items():
        planned, measured = event["planned"].get(name), event["measured"].get(name)
        if planned is None and measured is None:
            continue
        apart = share(measured / planned - 1, 0) if planned and measured is not None else NOTHING
        rows.append([words(shown), form(planned), form(measured), _signed(apart)])
    note = f"Measured memory is {event['memory_is']}." if event.get("memory_is") else ""
    columns = ["what", "planned", "measured", "difference"]
    table = Table("planned", "What the run was to take, and took", columns, rows, note)
    return Section("plan", "Planned and measured", [table])


def health_log(run: RunRecord) -> Section:
    """Everything that is worth a line, in order."""
    rows = [[count(step), words(what)] for step, what in _log(run)]
    table = Table("log", "What happened", ["step", "what"], rows)
    remarks = [Words(f"Left out: {remark}", {}, "note") for remark in run.remarks]
    nothing = Words("Nothing unusual is recorded.")
    return Section("health", "Health log", [*([table] if rows else [nothing]), *remarks])


def _log(run: RunRecord) -> Iterator[tuple[int, str]]:
    lines = [(event["step"], place, text) for place, event in enumerate(run.events) if (text := _told(event))]
    bad = [(step, "training") for step, loss in run.losses.train.items() if not math.isfinite(loss)]
    bad += [(step, "validation") for step, loss in run.losses.validation.items() if not math.isfinite(loss)]
    lines += [(step, len(run.events), f"the {kind} loss is not a finite number") for step, kind in sorted(bad)[:20]]
    if len(bad) > 20:
        lines.append((max(bad)[0], len(run.events) + 1, f"{len(bad) - 20} more losses are not finite numbers"))
    # A run that is continued goes back to an earlier step: the order of writing tells the story.
    for step, _, text in sorted(lines, key=lambda line: line[1]):
        yield step, text


def _told(event: Mapping[str, Any]) -> str:
    match event.get("event"):
        case "started":
            return f"{'continued' if event['step'] else 'started'} on {event.get('device', 'an unknown device')}"
        case "ended":
            reason = f": {event['reason']}" if event.get("reason") else ""
            return f"{event['how']}{reason}"
        case "accumulation":
            factor = f"learning rate times {event['lr_factor']:.3g}"
            return f"accumulation changed from {event['old']} to {event['new']}, {factor}"
        case "rank_growth":
            return f"rank of {event['group']} grew, {event['parameters']:,} adapter parameters"
        case "batch_probe":
            return f"probe of batches: {event['largest_harmless']} rows are harmless"
        case "rank_probe":
            return f"probe of ranks: {event['verdict']}"
        case "planned_and_measured" if event.get("stopped"):
            return "the run was stopped"
    return ""


def _signed(cell: Cell) -> Cell:
    return Cell(f"+{cell.text}", cell.value) if isinstance(cell.value, float) and cell.value > 0 else cell
