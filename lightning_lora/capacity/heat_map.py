"""Draws what a capacity monitor measured: groups of layers as a heat map, and the spectra of their updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_lora.capacity.reading import CapacityReading, GroupReading
from lightning_lora.files.atomic import atomic_file

_MOST_LABELLED = 12
"""Spectra that get a name in the legend."""


def draw_capacity(reading: CapacityReading, path: Path) -> None:
    """Draw truncation, tangent capture and effective rank of each group of layers, and the spectra of its updates.

    Args:
        reading: A reading with groups.
        path: The PNG file to write.
    """
    names, groups = list(reading.groups), list(reading.groups.values())
    figure = Figure(figsize=(12, max(3.6, 1.6 + 0.25 * len(names))), layout="constrained")
    half, capture, rank, spectrum = figure.subplots(1, 4, width_ratios=(1, 1, 1, 3))
    _draw_column(half, "lost at half\nof the rank", [group.truncation for group in groups], (0, 0.5), "{:.0%}")
    _draw_column(capture, "tangent\ncapture", [group.capture for group in groups], (0, 1), "{:.2f}")
    _draw_column(rank, "effective rank\n/ rank", [_share(group) for group in groups], (0, 1), "{:.2f}")
    half.set_yticks(range(len(names)), names)
    _draw_spectra(spectrum, reading)
    figure.suptitle(f"{reading.verdict} after step {reading.step:,}")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _share(group: GroupReading) -> float | None:
    return group.effective_rank / group.rank if group.rank else None


def _draw_column(
    axes: Axes, title: str, values: Sequence[float | None], limits: tuple[float, float], form: str
) -> None:
    """A column of coloured cells; one without a value is grey."""
    column = np.array([[math.nan if value is None else value] for value in values], dtype=float)
    axes.set_facecolor("lightgrey")
    axes.imshow(column, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    for row, value in enumerate(values):
        text = "?" if value is None else form.format(value)
        axes.text(0, row, text, ha="center", va="center", fontsize=7, color="black" if value is None else "white")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_spectra(axes: Axes, reading: CapacityReading) -> None:
    for place, (name, group) in enumerate(reading.groups.items()):
        values = np.array(group.spectrum, dtype=float)
        label = name if place < _MOST_LABELLED else None
        axes.plot(np.arange(1, len(values) + 1), np.where(values > 0, values, math.nan), label=label, linewidth=0.9)
    if any(value > 0 for group in reading.groups.values() for value in group.spectrum):
        axes.set_yscale("log")
    axes.set(xlabel="place", title="Singular values of the updates")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
