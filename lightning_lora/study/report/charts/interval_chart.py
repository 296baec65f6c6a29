"""Differences with their intervals, beside the band that counts as none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.svg import MARKS, NUM_STYLES, tag
from lightning_lora.study.report.content import Figure, Table

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 640, 20, 20, 30, 48, 56
_LONGEST = 40
_NEAR = 8
"""How many times longer than the main row needs it an axis may be to hold the others too."""


@dataclass(frozen=True)
class Difference:
    """A row of the chart.

    Args:
        name: What differs.
        word: What is found, in a word or two.
        mean: The difference.
        low: Lower end of its interval; minus infinity if it has none.
        style: Which colour and mark.
        text: The numbers, as they are written beside the name.
        is_main: Whether the axis is made for it: a row that is far from it is drawn at the edge, with an arrow.
    """

    name: str
    word: str
    mean: float
    low: float
    high: float
    style: int = 0
    text: str = ""
    is_main: bool = True

    @property
    def ends(self) -> list[float]:
        """The finite ones of its numbers."""
        return [end for end in (self.low, self.mean, self.high) if math.isfinite(end)]


def interval_chart(
    name: str, title: str, says: str, label: str, rows: Sequence[Difference], band: float, table: Table
) -> Figure:
    """Draw a dot and a line for each difference.

    Args:
        label: What the axis shows, with its unit.
        band: Differences inside of ``-band .. band`` count as none.
    """
    x = _axis(label, rows, band)
    bottom = _TOP + _ROW * len(rows)
    height = bottom + _BOTTOM
    left, right = _across(-band, x), _across(band, x)
    drawing = tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", says, id=f"{name}-says"),
        tag("rect", class_="band", x=left, y=_TOP - 6, width=right - left, height=bottom - _TOP + 6),
        _band_label(band, x),
        tag("path", class_="zero", d=f"M{_across(0, x):.1f} {_TOP - 6}V{bottom}"),
        *(_ticks(x, bottom)),
        *(_row(row, number, x) for number, row in enumerate(rows)),
        tag("text", label, class_="label", x=_WIDTH / 2, y=height - 8, text_anchor="middle"),
        viewBox=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_labelledby=f"{name}-title {name}-says",
    )
    points = {row.name: [(row.low, row.mean), (row.mean, row.mean), (row.high, row.mean)] for row in rows}
    return Figure(name, title, says, drawing, [], table, points, None, label)


def _axis(label: str, rows: Sequence[Difference], band: float) -> Axis:
    """An axis for the main rows and the band, and for the other rows as long as these can still be read."""
    ends = [-1.6 * band, 1.6 * band, *(end for row in rows if row.is_main for end in row.ends)]
    longest = _NEAR * (max(ends) - min(ends))
    for row in sorted(rows, key=lambda row: max(map(abs, row.ends), default=0.0)):
        if max([*ends, *row.ends]) - min([*ends, *row.ends]) <= longest:
            ends += row.ends
    return Axis.around(label, ends)


def _band_label(band: float, x: Axis) -> Markup:
    text = f"counts as none: ±{band:g}"
    room = 5.2 * len(text)  # half of its length on a phone, where texts are larger
    at = min(max(_across(0, x), room), _WIDTH - room)
    return tag("text", text, class_="label halo", paint_order="stroke", x=at, y=16, text_anchor="middle")


def _across(value: float, x: Axis) -> float:
    """Where a value is; one outside of the axis is at its edge."""
    return _LEFT + min(max(x.place(min(max(value, x.low), x.high)), 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)


def _ticks(x: Axis, bottom: int) -> list[str]:
    drawn = [tag("path", class_="frame", d=f"M{_LEFT} {bottom}H{_WIDTH - _RIGHT}")]
    for value, text in x.ticks():
        drawn.append(tag("text", text, class_="tick", x=_across(value, x), y=bottom + 20, text_anchor="middle"))
        drawn.append(tag("path", class_="frame", d=f"M{_across(value, x):.1f} {bottom}v5"))
    return drawn  # pyright: ignore[reportReturnType]


def _row(row: Difference, number: int, x: Axis) -> str:
    y = _TOP + _ROW * number + 34
    name = row.name if len(row.name) <= _LONGEST else f"{row.name[: _LONGEST - 1]}…"
    low, high, at = (_across(value, x) for value in (row.low, row.high, row.mean))
    caps = "".join(
        f"M{place:.1f} {y - 5}v10" for place, end in ((low, row.low), (high, row.high)) if x.low <= end <= x.high
    )
    value = [tag("tspan", f"  {row.text}", class_="value beside")] if row.text else []
    parts = [tag("text", f"{name}: {row.word}", *value, class_="name halo", paint_order="stroke", x=_LEFT, y=y - 15)]
    if math.isfinite(row.mean) and not x.low <= row.mean <= x.high:
        tip, back = (high, -6) if row.mean > x.high else (low, 6)
        parts.append(
            tag("path", class_="beyond", d=f"M{tip + 6 * back:.1f} {y}H{tip:.1f}m{back}-5L{tip:.1f} {y}l{back} 5")
        )
    elif math.isfinite(row.mean):
        parts += [
            tag("path", class_="whisker", d=f"M{low:.1f} {y}H{high:.1f}{caps}"),
            tag("path", class_="mark", d=MARKS[row.style % len(MARKS)], transform=f"translate({at:.1f} {y})"),
        ]
    return tag("g", *parts, class_=f"s{row.style % NUM_STYLES}")
