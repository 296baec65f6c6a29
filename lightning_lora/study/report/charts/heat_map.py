"""Numbers by layer and role as a table whose cells are coloured: it is read, printed and scrolled as any other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from lightning_lora.capacity.reading import place_of
from lightning_lora.study.report.content import Cell, Table
from lightning_lora.study.report.numbers import words

NUM_SHADES = 9


def heat_cell(value: float | None, limit: float, shown: Callable[[float], Cell]) -> Cell:
    """A number with a colour, darker towards ``limit``; one without a value is a question mark."""
    if value is None or not math.isfinite(value):
        return Cell("?", None, "heat-none")
    shade = min(NUM_SHADES - 1, max(0, int(NUM_SHADES * value / limit)))
    return Cell(shown(value).text, value, f"heat-{shade}")


def heat_map(
    name: str,
    caption: str,
    groups: Mapping[str, Mapping[str, Cell]],
    measures: Sequence[str],
    note: str = "",
    is_folded: bool = False,
) -> Table:
    """A table with a row for each layer and a column for each measure and role.

    Args:
        groups: Group of layers, such as ``"layer 3 mlp"``, to its measures.
        measures: The measures, in the order of the columns.
        note: A remark below it.
        is_folded: Whether it is shown when asked for.
    """
    places = {group: place_of(group) for group in groups}
    layers = sorted(dict.fromkeys(place[0] for place in places.values()), key=_natural)
    roles = list(dict.fromkeys(place[1] for place in places.values()))
    by_place = {places[group]: cells for group, cells in groups.items()}
    columns = [f"{measure}, {role}" if role else measure for measure in measures for role in roles]
    empty = Cell("")
    rows = [
        [words(layer), *(by_place.get((layer, role), {}).get(each, empty) for each in measures for role in roles)]
        for layer in layers
    ]
    return Table(name, caption, ["layer", *columns], rows, note, is_folded)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
