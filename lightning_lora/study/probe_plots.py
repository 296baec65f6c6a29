"""Draws the results of probes: held-out loss against batch, and before and after the branches of two ranks."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.rank_probe_result import RankProbeResult


def draw_probe(result: BatchProbeResult, path: Path) -> None:
    """Draw held-out loss against batch, with the intervals of the paired differences to the smallest batch."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    batches = list(result.losses)
    widths = {pair.large: pair.interval.half_width for pair in result.comparisons if pair.small == batches[0]}
    # The smallest batch is the reference of the others, so it has no interval.
    spread = [widths.get(batch, 0.0) for batch in batches]
    spread = [width if math.isfinite(width) else 0.0 for width in spread]
    axes.errorbar(batches, list(result.losses.values()), spread, marker="o", capsize=4, label="held-out loss")
    axes.axvline(result.batch_rows, color="grey", linestyle=":", label="batch of the run")
    bound = f"{result.bound} " if result.bound else ""
    text = f"costs nothing: {bound}{result.largest_harmless}"
    axes.axvspan(batches[0], result.largest_harmless, color="tab:green", alpha=0.1, label=text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel(f"rows of an optimizer step ({result.num_rows:,} rows in each branch)")
    _save(figure, axes, result.num_held_out, path)


def draw_rank_probe(result: RankProbeResult, path: Path) -> None:
    """Draw the losses of both branches, with the interval of their paired difference at the grown one."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    names = ["before", f"rank {result.rank}", f"rank {result.grown_rank}"]
    width = result.interval.half_width
    spread = width if math.isfinite(width) else 0.0
    axes.plot(names, [result.start_loss, result.control_loss, result.grown_loss], marker="o", linestyle=":")
    axes.errorbar(names[2:], [result.grown_loss], [spread], capsize=6, color="tab:orange", label="paired interval")
    axes.set_title(f"{result.verdict}: gain {result.gain:+.4f} +- {width:.4f} nats", fontsize=10)
    _save(figure, axes, result.num_held_out, path)


def _save(figure: Figure, axes: Axes, num_rows: int, path: Path) -> None:
    axes.set_ylabel(f"nats, mean of {num_rows:,} held-out rows")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=140)
