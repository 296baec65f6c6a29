"""The page of a plan: at most 40 lines of 80 columns, without colours."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_lora.planning.advice.method import NAMES
from lightning_lora.planning.advice.settings import ALARM
from lightning_lora.step_memory import StepMemory

LINES, COLUMNS = 40, 80
_INDENT = 10
_SHOWN_RANKS, _FEW_RANKS = (1, 8, 32, 128, 512), (1, 32, 512)
DISAGREE = (
    "PEFT starts at rank 8 on a few layers, TRL at 16, axolotl at 32; the rates differ by 10. Attention only is worse "
    "at equal parameters (TML), but was not in one math task."
)


def page(plan: Any) -> str:
    """A `Plan` in words and tables. What does not fit is left out in whole lines: ranks, reasons, then notes."""
    lines: list[str] = []
    for ranks, has_reasons in ((_SHOWN_RANKS, True), (_FEW_RANKS, True), (_FEW_RANKS, False)):
        body = _body(plan, ranks, has_reasons)
        for left_out in range(len(plan.notes) + 1):
            lines = body + _notes(plan, left_out)
            if len(lines) <= LINES:
                return "\n".join(lines)
            if has_reasons:
                break  # notes are left out last
    return "\n".join(lines)


def _body(plan: Any, ranks: Sequence[int], has_reasons: bool) -> list[str]:
    return [
        *textwrap.wrap(f"Plan: {plan.sentence}", COLUMNS, subsequent_indent="      "),
        *_part("model", plan.model),
        *_part("data", _data(plan)),
        *_capacity(plan, ranks),
        *_part("method", _said(plan, "method")),
        *_part("settings", _settings(plan, has_reasons)),
        *_memory(plan),
        *_part("cost", plan.cost),
    ]


def _notes(plan: Any, left_out: int) -> list[str]:
    """What else to know, without the last ``left_out`` of the plan's notes."""
    notes = list(plan.notes[: len(plan.notes) - left_out])
    if left_out:
        notes.append(f"{left_out} more note{'s' if left_out > 1 else ''}: in plan.json")
    notes += [f"how sure: {plan.sureness}", f"sources disagree: {DISAGREE}"]
    return [line for note in notes for line in _note(note)]


def _part(name: str, text: str) -> list[str]:
    if not text:
        return []
    first = f"{name:<{_INDENT}}"
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=" " * _INDENT, break_on_hyphens=False)


def _note(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _said(plan: Any, topic: str) -> str:
    reasons = [reason for name, reason in plan.topics if name == topic]
    return "; ".join(f"{reason.value}: {reason.why}" for reason in reasons)


def _data(plan: Any) -> str:
    data = plan.data
    told = ["a stream of unknown length" if data.rows is None else f"{data.rows:,} rows"]
    if data.packed_rows is not None:
        told[0] += f" in {data.packed_rows:,} packs"
    if data.unique_supervised_tokens is not None:
        told.append(f"{data.unique_supervised_tokens:,} trained {data.unit} in unique rows")
    if data.bits is not None and data.unit != "tokens":
        told.append(
            f"{data.bits:,.0f} bits ({data.num_classes} classes x rows)"
            if data.num_classes
            else f"{data.bits:,.0f} bits"
        )
    cut = "cut (their ends are not learned)" if data.truncated_rows else "cut"
    empty = "without target (left out)" if data.unsupervised_rows else "without target"
    counts = {"repeated": data.duplicate_rows, cut: data.truncated_rows, empty: data.unsupervised_rows}
    told += [f"{count:,} {name}" for name, count in counts.items() if count or data.unit == "tokens"]
    if data.longest_row is not None:
        told.append(f"longest {data.longest_row:,} tokens")
    return ", ".join(told)


def _capacity(plan: Any, ranks: Sequence[int]) -> Iterator[str]:
    """The table of ranks, for the planned targets. Ranks that add no parameters are left out, but for the planned."""
    rows = [row for row in plan.capacity if row.targets == plan.targets]
    chosen = plan.settings["rank"]
    most = max(row.parameters for row in rows)
    full = min(row.rank for row in rows if row.parameters == most)
    shown = [row for row in rows if row.rank == chosen or (row.rank in (*ranks, full) and row.rank <= full)]
    if all(row.verdict == "cannot tell" for row in shown):
        sizes = ", ".join(f"rank {row.rank} has {row.parameters:,}" for row in shown if row.rank in (1, 32, chosen))
        yield from _part("capacity", f"cannot tell: the targets' information is unknown; parameters: {sizes}")
        return
    yield f"{'capacity':<{_INDENT}}{'rank':>6} {'parameters':>16} {'A':>9} {'B':>9}  verdict"
    for row in shown:
        mark = "  <-" if row.rank == chosen else ""
        sizes = f"{row.parameters:>16,} {_ratio(row.ratio_a):>9} {_ratio(row.ratio_b):>9}"
        yield f"{'':<{_INDENT}}{row.rank:>6} {sizes}  {row.verdict}{mark}"
    unit = plan.data.unit.removesuffix("s")
    yield f"{'':<{_INDENT}}A: {unit}s per parameter; B: their bits per 2 bits of a parameter"
    yield f"{'':<{_INDENT}}inside: A <= 1 and B <= 0.5, tight: A <= 2 and B <= 1, over: more"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}"


def _settings(plan: Any, has_reasons: bool) -> str:
    settings = plan.settings
    rate = settings["learning_rate"]
    told = [] if rate is None else [f"learning_rate {rate:g}"]
    if rate is not None and plan.method != "full":
        told[0] += f" (adapters {rate * plan.lr_multiplier:g})"
    told.append(
        f"{_rows(settings['batch_size'])} x {settings['accumulate_grad_batches']} accumulated x "
        f"{settings['devices']} device{'s' if settings['devices'] > 1 else ''} = {settings['rows_per_step']} per step"
    )
    told.append(f"{settings['steps']:,} step{'' if settings['steps'] == 1 else 's'} ({plan.length})")
    if settings["step_memory"] is not None:
        told.append(str(StepMemory.from_dict(settings["step_memory"])))
    reasons = [reason for topic, reason in plan.topics if topic == "settings"]
    if not has_reasons:  # what trains at which rate, and alarms, cannot be guessed
        reasons = [reason for reason in reasons if reason.value.startswith("learning rate") or ALARM in reason.why]
    why = [f"{reason.value}: {reason.why}" for reason in reasons]
    return ", ".join(told) + ". " + "; ".join([*why, *([] if has_reasons else ["more reasons: plan.json"])])


def _memory(plan: Any) -> Iterator[str]:
    """A row for each method, a column for each part, in GiB or MiB on one device."""
    known: Sequence[str] = [name for name in NAMES if plan.memory.get(name) is not None]
    if not known:
        yield from _not_traced(plan, "memory")
        return
    largest = max(plan.memory[name].total for name in known)
    unit, size = next(((unit, size) for unit, size in _UNITS if largest >= 10 * size), _UNITS[-1])
    heads = ("weights", "adapt", "grads", "optim", "activ", "logits", "total")
    yield f"{'memory':<{_INDENT}}{unit:<6}" + "".join(f"{head:>9}"[1:] for head in heads)
    for name in known:
        parts = plan.memory[name]
        assert parts is not None
        sizes = (parts.weights, parts.adapters, parts.gradients, parts.optimizer, parts.activations + parts.overhead)
        cells = "".join(f"{_number(each / size):>8}" for each in (*sizes, parts.logits, parts.total))
        yield f"{'':<{_INDENT}}{name:<6}{cells}" + (" *" if parts.total > plan.budget else "")
    over = any(plan.memory[name].total > plan.budget for name in known)
    mark = "; * does not fit" if over else ""
    beside = max(plan.memory[name].overhead for name in known)
    others = f"; activ with {_number(beside / size)} {unit} of CUDA's context or buckets of gradients" if beside else ""
    yield from _part(
        "",
        f"at the fullest moment of a step, before most gradients, with {settings_rows(plan)}; a device has "
        f"{plan.budget / 2**30:.3g} GiB{others}{mark}",
    )
    yield from _not_traced(plan, "")


def _not_traced(plan: Any, name: str) -> Iterator[str]:
    """Why the memory of methods is not known, each reason once."""
    methods: dict[str, list[str]] = {}
    for method, why in plan.not_traced.items():
        # What else could be done is in plan.json.
        methods.setdefault(why.partition("; its memory is not known")[0], []).append(method)
    for why, of in methods.items():
        yield from _part(name or " ", f"{', '.join(of)} not traced, because {why}")
        name = ""


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _number(value: float) -> str:
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else "<0.01"


def settings_rows(plan: Any) -> str:
    """The rows that the table of memory is for."""
    strategy = plan.settings["strategy"]
    # Weights of bitsandbytes cannot be sharded.
    other = " (qlora: ddp)" if strategy == "fsdp2" and plan.memory.get("qlora") is not None else ""
    length = "" if plan.data.longest_row is None else " of the longest length"
    return f"{_rows(plan.settings['batch_size'])}{length}, {strategy}{other}"


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
