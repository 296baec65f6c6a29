"""Draws what a capacity monitor measured: heat maps by layer and role, and the spectra of the updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_lora.capacity.reading import FULL_BELOW, SPARE_BELOW, CapacityReading, GroupReading, place_of
from lightning_lora.files.atomic import atomic_file

_MAPS = (
    (f"gain lost at half rank\n(spare below {SPARE_BELOW:.0%})", "truncation", 0.5, "{:.0%}"),
    (f"tangent capture\n(full below {FULL_BELOW})", "capture", 1.0, "{:.2f}"),
    ("effective rank / rank\n(descriptive)", "effective_share", 1.0, "{:.2f}"),
)
"""Title, number of a group, value of the brightest colour and format of each heat map."""
_LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_MOST_LINES = 6
"""Spectra of each role: more rows are joined with their neighbours, because single lines could not be told apart."""


def draw_capacity(reading: CapacityReading, path: Path) -> None:
    """Draw truncation, tangent capture and effective rank by layer and role, and the spectra of the updates."""
    places = {name: place_of(name) for name in reading.groups}
    rows, columns = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (0, 1))
    longest = max(map(len, rows))
    width = max(1.3, 0.75 * len(columns) + 0.2)
    figure = Figure(figsize=(6.2 + 3 * width + 0.08 * longest, max(3.8, 1.7 + 0.2 * len(rows))), layout="constrained")
    *maps, spectrum = figure.subplots(1, 4, width_ratios=(width, width, width, 4.5))
    for axes, (title, number, limit, form) in zip(maps, _MAPS, strict=True):
        cells = np.full((len(rows), len(columns)), math.nan)
        words: dict[tuple[int, ...], str] = {}
        for name, (row, column) in places.items():
            group, place = reading.groups[name], (rows.index(row), columns.index(column))
            value = _number(group, number)
            cells[place] = math.nan if value is None else value
            words[place] = _in_words(group, value, form)
        _draw_cells(axes, title, cells, words, limit)
        axes.set_xticks(range(len(columns)), columns, fontsize=7)
    maps[0].set_yticks(range(len(rows)), rows, fontsize=7)
    _draw_spectra(spectrum, reading, places)
    figure.suptitle(f"{reading.verdict_in_words} after step {reading.step:,}")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _number(group: GroupReading, number: str) -> float | None:
    if number == "effective_share":
        return group.effective_rank / group.rank if group.rank else None
    return getattr(group, number)


def _in_words(group: GroupReading, value: float | None, form: str) -> str:
    """What a cell says; ``?`` for a number that was not measured, or cannot be told from chance."""
    if value is not None:
        return form.format(value)
    return "idle" if group.state == "idle" else "?"


def _draw_cells(axes: Axes, title: str, cells: np.ndarray, words: Mapping[tuple[int, ...], str], limit: float) -> None:
    """A heat map; a cell without a value is grey, and without words where there is no such group."""
    axes.set_facecolor("lightgrey")
    axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=limit)
    for (row, column), text in words.items():
        value = cells[row, column]
        colour = "white" if not math.isnan(value) and value < 0.6 * limit else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set_title(title, fontsize=8)
    axes.set_yticks([])


def _draw_spectra(axes: Axes, reading: CapacityReading, places: Mapping[str, tuple[str, str]]) -> None:
    """A line for each role and some neighbouring rows: dark for the first rows, light for the last ones."""
    rows, columns = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (0, 1))
    width = math.ceil(len(rows) / _MOST_LINES)
    blocks = [rows[start : start + width] for start in range(0, len(rows), width)]
    shades = [0.9 * number / max(1, len(blocks) - 1) for number in range(len(blocks))]
    for block, shade in zip(blocks, shades, strict=True):
        for column, style in zip(columns, cycle(_LINES), strict=False):
            names = [name for name, place in places.items() if place[0] in block and place[1] == column]
            if names:
                heights = _mean_spectrum([reading.groups[name].spectrum for name in names])
                axes.plot(np.arange(1, len(heights) + 1), heights, style, color=colormaps["viridis"](shade))
    if any(value > 0 for group in reading.groups.values() for value in group.spectrum):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("place")
    axes.set_title("singular values of the updates, mean over weights", fontsize=8)
    axes.grid(alpha=0.3)
    styles = [Line2D([], [], color="black", linestyle=_LINES[k % len(_LINES)]) for k in range(len(columns))]
    lines = [Line2D([], [], color=colormaps["viridis"](shade)) for shade in shades]
    roles = list(zip(styles, columns, strict=True)) if any(columns) else []
    named = [*roles, *zip(lines, (" to ".join(dict.fromkeys((block[0], block[-1]))) for block in blocks), strict=True)]
    axes.legend([line for line, _ in named], [name for _, name in named], fontsize=7)


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> np.ndarray:
    """The mean of each place, with zeros beyond the rank; nothing is drawn where it is zero."""
    length = max(map(len, spectra))
    means = np.mean([np.pad(np.array(each, dtype=float), (0, length - len(each))) for each in spectra], axis=0)
    return np.where(means > 0, means, math.nan)
