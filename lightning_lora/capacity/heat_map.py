"""Draws what a capacity monitor measured: heat maps by layer and role, and the spectra of the updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_lora.capacity.reading import FULL_BELOW, SPARE_BELOW, CapacityReading, GroupReading
from lightning_lora.files.atomic import atomic_file

_MAPS = (
    (f"gain lost at half rank\n(spare below {SPARE_BELOW:.0%})", "truncation", 0.5, "{:.0%}"),
    (f"tangent capture\n(full below {FULL_BELOW})", "capture", 1.0, "{:.2f}"),
    ("effective rank / rank\n(descriptive)", "effective_share", 1.0, "{:.2f}"),
)
"""Title, number of a group, value of the brightest colour and format of each heat map."""
_LINES = ("-", "--", ":", "-.")


def draw_capacity(reading: CapacityReading, path: Path) -> None:
    """Draw truncation, tangent capture and effective rank by layer and role, and the spectra of the updates.

    Args:
        reading: A reading with groups.
        path: The PNG file to write.
    """
    places = {name: _place(name) for name in reading.groups}
    rows, columns = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (0, 1))
    longest = max(map(len, rows))
    width = max(1.3, 0.75 * len(columns) + 0.2)
    figure = Figure(figsize=(6.2 + 3 * width + 0.08 * longest, max(3.8, 1.7 + 0.2 * len(rows))), layout="constrained")
    *maps, spectrum = figure.subplots(1, 4, width_ratios=(width, width, width, 4.5))
    for axes, (title, number, limit, form) in zip(maps, _MAPS, strict=True):
        cells = np.full((len(rows), len(columns)), math.nan)
        for name, (row, column) in places.items():
            value = _number(reading.groups[name], number)
            cells[rows.index(row), columns.index(column)] = math.nan if value is None else value
        _draw_cells(axes, title, cells, limit, form)
        axes.set_xticks(range(len(columns)), columns, fontsize=7)
    maps[0].set_yticks(range(len(rows)), rows, fontsize=7)
    _draw_spectra(spectrum, reading, places)
    figure.suptitle(f"{reading.verdict_in_words} after step {reading.step:,}")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _place(name: str) -> tuple[str, str]:
    """Row and column of a group: ``layer 3`` and ``mlp``; a weight that is a group of its own has no column name."""
    row, _, role = name.rpartition(" ")
    return (row, role) if row else (name, "")


def _number(group: GroupReading, number: str) -> float | None:
    if number == "effective_share":
        return group.effective_rank / group.rank if group.rank else None
    return getattr(group, number)


def _draw_cells(axes: Axes, title: str, cells: np.ndarray, limit: float, form: str) -> None:
    """A heat map; a cell without a value is grey."""
    axes.set_facecolor("lightgrey")
    axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=limit)
    for (row, column), value in np.ndenumerate(cells):
        text = "?" if math.isnan(value) else form.format(value)
        is_dark = not math.isnan(value) and value < 0.6 * limit
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if is_dark else "black")
    axes.set_title(title, fontsize=8)
    axes.set_yticks([])


def _draw_spectra(axes: Axes, reading: CapacityReading, places: Mapping[str, tuple[str, str]]) -> None:
    """A line for each group: dark for the first rows, light for the last ones, a style for each role."""
    rows, columns = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (0, 1))
    for name, group in reading.groups.items():
        values, (row, column) = np.array(group.spectrum, dtype=float), places[name]
        colour = colormaps["viridis"](0.9 * rows.index(row) / max(1, len(rows) - 1))
        style = _LINES[columns.index(column) % len(_LINES)]
        heights = np.where(values > 0, values, math.nan)
        axes.plot(np.arange(1, len(values) + 1), heights, style, color=colour, linewidth=0.9)
    if any(value > 0 for group in reading.groups.values() for value in group.spectrum):
        axes.set_yscale("log")
    axes.set_xlabel("place")
    axes.set_title("singular values of the updates, mean over weights", fontsize=8)
    axes.grid(alpha=0.3)
    styles = [Line2D([], [], color="black", linestyle=_LINES[k % len(_LINES)]) for k in range(len(columns))]
    ends = [Line2D([], [], color=colormaps["viridis"](shade)) for shade in (0.0, 0.9)][: len(rows)]
    roles = list(zip(styles, columns, strict=True)) if any(columns) else []
    named = [*roles, *zip(ends, (rows[0], rows[-1]), strict=False)]
    axes.legend([line for line, _ in named], [name for _, name in named], fontsize=7)
