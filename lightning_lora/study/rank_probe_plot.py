"""Draws the result of a rank probe: held-out losses before, and after the branches."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.rank_probe_result import RankProbeResult


def draw_rank_probe(result: RankProbeResult, path: Path) -> None:
    """Draw the losses of both branches, with the interval of their paired difference at the grown one."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    names = ["before", f"rank {result.rank}", f"rank {result.grown_rank}"]
    width = result.interval.half_width
    spread = width if math.isfinite(width) else 0.0
    axes.plot(names, [result.start_loss, result.control_loss, result.grown_loss], marker="o", linestyle=":")
    axes.errorbar(names[2:], [result.grown_loss], [spread], capsize=6, color="tab:orange", label="paired interval")
    axes.set_ylabel(f"nats, mean of {result.num_held_out:,} held-out rows")
    axes.set_title(f"{result.verdict}: gain {result.gain:+.4f} +- {width:.4f} nats", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=140)
