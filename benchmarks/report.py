"""A run as JSON (all numbers), Markdown (a table) and PNG (step times over the floor)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.timing import Phases, Spread, paired_ratio, spread


@dataclass
class Result:
    """What a run found out about one contender.

    Args:
        status: ``"timed"``, or why it was not.
        loss_error: Relative error of the loss against float64.
        gradient_error: Largest relative error of a factor's gradient.
        trainable: Number of trained parameters.
        peak_bytes: Peak of a step above the base weights.
        saved_bytes: What autograd keeps from forward to backward, parameters apart.
        times: Of every repetition.
    """

    status: str
    loss_error: float | None = None
    gradient_error: float | None = None
    trainable: int | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    times: list[Phases] = field(default_factory=list)

    def seconds(self, phase: str) -> list[float]:
        """Of one phase, by repetition."""
        return [getattr(phases, phase) for phases in self.times]


def ratios(results: Mapping[str, Result], of: str) -> dict[str, Spread]:
    """Step time of every timed contender over that of ``of``, paired by repetition; empty if ``of`` was not timed."""
    if of not in results or not results[of].times:
        return {}
    others = results[of].seconds("step")
    return {name: paired_ratio(result.seconds("step"), others) for name, result in results.items() if result.times}


def as_json(about: Mapping[str, Any], results: Mapping[str, Result], baselines: Sequence[str]) -> dict[str, Any]:
    """Everything, in plain types."""
    compared = {baseline: ratios(results, baseline) for baseline in baselines}
    contenders = {}
    for name, result in results.items():
        entry = asdict(result)
        entry["times"] = {phase: result.seconds(phase) for phase in Phases._fields}
        if result.times:
            entry["seconds"] = {phase: spread(result.seconds(phase))._asdict() for phase in Phases._fields}
        entry["ratios"] = {base: found[name]._asdict() for base, found in compared.items() if name in found}
        contenders[name] = entry
    return {**about, "contenders": contenders}


def as_markdown(about: Mapping[str, Any], results: Mapping[str, Result], baselines: Sequence[str]) -> str:
    """A heading, the machine, one row for each contender, and why those that were not timed were not."""
    compared = {baseline: ratios(results, baseline) for baseline in baselines if ratios(results, baseline)}
    titles = ["", "step, ms", "forward", "backward", "optimizer", *(f"step / {base}" for base in compared)]
    titles += ["peak, MB", "saved, MB", "gradient error"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, result in results.items():
        if not result.times:
            continue
        medians = {phase: spread(result.seconds(phase)).median for phase in Phases._fields}
        cells = [name, *(f"{medians[phase] * 1e3:.1f}" for phase in ("step", "forward", "backward", "optimizer"))]
        cells += [_ratio(found[name]) for found in compared.values()]
        cells += [_megabytes(result.peak_bytes), _megabytes(result.saved_bytes)]
        cells.append("" if not result.gradient_error else f"{result.gradient_error:.1e}")
        rows.append(f"| {' | '.join(cells)} |")
    left_out = [f"- Not timed: {name}: {result.status}." for name, result in results.items() if not result.times]
    notes = [
        "Milliseconds are medians; ratios are medians of the ratios within each repetition [10th, 90th percentile]. "
        "Peak: bytes above the base weights in a step. Saved: bytes autograd keeps for the backward.",
        *left_out,
    ]
    return "\n".join([*_heading(about), "", *rows, "", *notes, ""])


def _heading(about: Mapping[str, Any]) -> list[str]:
    work, where, settings, load = (about[key] for key in ("workload", "machine", "settings", "load"))
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        f"## {work['name']}: {work['about']}",
        "",
        f"{work['parameters'] / 1e6:.1f} M parameters, {work['tokens']:,} tokens a step ({work['rows']} x "
        f"{work['length']}), {work['supervised']:.0%} of them supervised; rank {settings['rank']} on all layers, "
        f"{settings['dtype']}, {settings['repetitions']} repetitions after {settings['warmups']}.",
        "",
        f"{where.get('gpu', where['cpu'])}, {where['threads']} threads on {where['cores']} cores; {versions}; load "
        f"{_number(load['before'])} before, {_number(load['after'])} after.",
    ]
    if load["disturbed"]:
        lines += ["", "**The load exceeded the cores: other programs ran meanwhile, and these times are unreliable.**"]
    return lines


def plot(path: Path, title: str, results: Mapping[str, Result], baseline: str) -> None:
    """Bars of step time over ``baseline`` with 10th and 90th percentile; milliseconds if that was not timed."""
    found = ratios(results, baseline)
    label = f"step time / {baseline}"
    if not found:
        found = {name: spread(result.seconds("step")) for name, result in results.items() if result.times}
        label = "step time, s"
    names, values = list(found), list(found.values())
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    whiskers = [[v.median - v.p10 for v in values], [v.p90 - v.median for v in values]]
    axes.barh(names, [v.median for v in values], xerr=whiskers, capsize=3, color="#4c72b0")
    if label.endswith(baseline):
        axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def write(folder: Path, about: Mapping[str, Any], results: Mapping[str, Result], baselines: Sequence[str]) -> str:
    """Write ``<workload>.json``, ``.md`` and ``.png`` into ``folder``; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    name = about["workload"]["name"]
    markdown = as_markdown(about, results, baselines)
    (folder / f"{name}.json").write_text(json.dumps(as_json(about, results, baselines), indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown)
    if any(result.times for result in results.values()):
        plot(folder / f"{name}.png", f"{name}: one training step", results, baselines[0])
    return markdown


def _ratio(value: Spread) -> str:
    return f"{value.median:.3f} [{value.p10:.3f}, {value.p90:.3f}]"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
