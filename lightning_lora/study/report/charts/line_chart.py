"""Lines over a common axis: losses, noise scales, curves of learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.svg import MARKS, NUM_STYLES, polyline, tag
from lightning_lora.study.report.content import Cell, Figure, Table
from lightning_lora.study.report.numbers import words

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 72, 118, 14, 54
MOST_POINTS = 300
"""Points of a line; what a screen can show."""
_MANY_MARKS = 40
_LABEL_LENGTH, _LABEL_STEP = 17, 15

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line.

    Args:
        name: Its name in the legend; series of one name are hidden together.
        points: Its points ``(x, y)``, in ascending order.
        style: Which colour, dash and mark.
        is_thin: Whether it is in the background: a single seed, a loss that is not smoothed.
        has_line: Whether its points are joined.
        low: Lower end of its interval at each point.
        rings: Points that are pointed at, such as a chosen learning rate.
        edges: Points that are pointed at as wanting, such as a best rate at the edge of its sweep.
        crosses: Points where something failed.
        is_off: Whether it is shown only when asked for.
    """

    name: str
    points: Points
    style: int = 0
    is_thin: bool = False
    has_line: bool = True
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    rings: Points = field(default_factory=tuple)
    edges: Points = field(default_factory=tuple)
    crosses: Points = field(default_factory=tuple)
    is_off: bool = False

    @property
    def pins(self) -> Points:
        """Its rings, edges and crosses."""
        return [*self.rings, *self.edges, *self.crosses]

    def thinned(self) -> Series:
        """The same with at most `MOST_POINTS`, evenly spread in the logarithm of the place; the last one is kept."""
        kept = spread(len(self.points), MOST_POINTS)
        if len(kept) == len(self.points):
            return self
        points = [self.points[at] for at in kept]
        low, high = ([ends[at] for at in kept] if ends else [] for ends in (self.low, self.high))
        return replace(self, points=points, low=low, high=high)


def spread(length: int, most: int) -> list[int]:
    """At most ``most`` of the places ``0 .. length - 1``, dense at the start; the first and the last are among them.

    >>> spread(3, 5), spread(1000, 4)
    ([0, 1, 2], [0, 9, 99, 999])
    """
    if length <= most:
        return list(range(length))
    return sorted({round(length ** (at / (most - 1))) - 1 for at in range(most)})


def line_chart(
    name: str,
    title: str,
    says: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    table: Table | None = None,
    choice: str = "",
    limits: Sequence[float] = (),
) -> Figure:
    """Draw lines.

    Args:
        table: The numbers that matter most. None: the first, lowest and last point of each line.
        choice: Words on the button that shows this figure in the place of its neighbours.
        limits: Heights at which a line is drawn that is nobody's.
    """
    series = [each.thinned() for each in series]
    names = list(dict.fromkeys(each.name for each in series))
    drawing = tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", says, id=f"{name}-says"),
        frame(x, y),
        *(_limit(at, x, y) for at in limits),
        *(_drawn(each, names.index(each.name), x, y) for each in series),
        _end_labels(series, x, y),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-says",
    )
    script = {
        "x": {"low": x.low, "high": x.high, "log": x.is_log, "label": x.label, "marks": list(x.marks)},
        "y": {"low": y.low, "high": y.high, "log": y.is_log, "label": y.label},
        "series": [_for_script(each, names.index(each.name)) for each in series],
        "limits": list(limits),
        "box": [LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM],
    }
    points = {f"{each.name}{' (thin)' if each.is_thin else ''}": each.points for each in series}
    styles = [next(each.style for each in series if each.name == name) for name in names]
    off = [names.index(each.name) for each in series if each.is_off]
    numbers = table or _ends(name, title, x, series)
    return Figure(name, title, says, drawing, names, numbers, points, script, x.label, choice, styles, off)


def frame(x: Axis, y: Axis) -> Markup:
    """Axes, their texts and the grid."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, text in y.ticks():
        at = bottom - y.place(value) * (bottom - TOP)
        parts += [
            tag("path", d=f"M{LEFT} {at:.1f}H{right}"),
            tag("text", text, x=LEFT - 8, y=at + 4, text_anchor="end"),
        ]
    for value, text in x.ticks():
        at = LEFT + x.place(value) * (right - LEFT)
        parts += [
            tag("path", d=f"M{at:.1f} {TOP}V{bottom}"),
            tag("text", text, x=at, y=bottom + 20.0, text_anchor="middle"),
        ]
    middle = (LEFT + right) / 2
    return Markup("").join(
        [
            tag("g", *parts, class_="grid"),
            tag("path", d=f"M{LEFT} {TOP}V{bottom}H{right}", class_="frame"),
            tag("text", x.label, class_="label", x=middle, y=HEIGHT - 8, text_anchor="middle"),
            tag(
                "text",
                y.label,
                class_="label",
                transform=f"translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)",
                text_anchor="middle",
            ),
        ]
    )


def on_page(point: tuple[float, float], x: Axis, y: Axis) -> tuple[float, float]:
    """The place of a point in the drawing."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + x.place(point[0]) * width, TOP + (1 - y.place(point[1])) * height


def _drawn(series: Series, number: int, x: Axis, y: Axis) -> Markup:
    places = [on_page(point, x, y) for point in series.points]
    parts = []
    if series.low:
        parts.append(tag("path", d=_area(series, x, y), class_="area"))
    if series.has_line:
        parts.append(tag("path", d=polyline(places), class_="thin" if series.is_thin else "line"))
    if not series.is_thin and (len(places) <= _MANY_MARKS or not series.has_line):
        parts += [_mark(place, series.style) for place in places if not math.isnan(sum(place))]
    kinds = ["ring"] * len(series.rings) + ["ring edge"] * len(series.edges) + ["cross-mark"] * len(series.crosses)
    parts += [_pin(kind, on_page(point, x, y)) for kind, point in zip(kinds, series.pins, strict=True)]
    style = f"s{series.style % NUM_STYLES}{' off' if series.is_off else ''}"
    return tag("g", *parts, class_=style, data_series=number)


def _pin(kind: str, place: tuple[float, float]) -> Markup:
    """A ring around a point, or a cross at it."""
    at = {"class_": f"pin {kind}", "transform": f"translate({place[0]:.1f} {place[1]:.1f})"}
    return tag("path", d="M-5-5L5 5M5-5L-5 5", **at) if kind == "cross-mark" else tag("circle", r=9, **at)


def _limit(height: float, x: Axis, y: Axis) -> Markup:
    return tag("path", class_="limit", d=f"M{LEFT} {on_page((x.low, height), x, y)[1]:.1f}H{WIDTH - RIGHT}")


def _area(series: Series, x: Axis, y: Axis) -> str:
    """The outline of the interval; an end below the axis is drawn at its edge."""
    low, high = (
        [(point[0], min(max(end, y.low), y.high)) for point, end in zip(series.points, ends, strict=True)]
        for ends in (series.low, series.high)
    )
    outline = [on_page(point, x, y) for point in [*high, *reversed(low)]]
    return f"{polyline(outline)}Z" if outline else ""


def _mark(place: tuple[float, float], style: int) -> Markup:
    return tag(
        "path", d=MARKS[style % len(MARKS)], class_="mark", transform=f"translate({place[0]:.1f} {place[1]:.1f})"
    )


def _end_labels(series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """The name of each line at its end, moved apart where two would meet."""
    labels: list[tuple[float, Series]] = []
    for each in series:
        ends = [place[1] for place in (on_page(point, x, y) for point in each.points) if not math.isnan(sum(place))]
        if ends and not each.is_thin and not each.is_off:
            labels.append((ends[-1], each))
    labels.sort(key=lambda label: label[0])
    drawn, free = [], TOP + 4.0
    for number, (height, each) in enumerate(labels):
        left = len(labels) - number - 1
        at = min(max(height + 4, free), HEIGHT - BOTTOM - left * _LABEL_STEP)
        free = at + _LABEL_STEP
        text = each.name if len(each.name) <= _LABEL_LENGTH else f"{each.name[: _LABEL_LENGTH - 1]}…"
        drawn.append(tag("text", text, x=WIDTH - RIGHT + 8, y=at, class_=f"s{each.style % NUM_STYLES}"))
    return tag("g", *drawn, class_="ends", aria_hidden="true")


def _for_script(series: Series, number: int) -> dict[str, object]:
    rounded = [[_digits(x), _digits(y)] for x, y in series.points]
    return {
        "name": series.name,
        "group": number,
        "points": rounded,
        "thin": series.is_thin,
        "line": series.has_line,
        "low": [_digits(value) for value in series.low],
        "high": [_digits(value) for value in series.high],
        "pins": [[_digits(x), _digits(y)] for x, y in series.pins],
        "off": series.is_off,
    }


def _digits(value: float) -> float | None:
    """Five digits: a screen shows no more; None where there is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _ends(name: str, title: str, x: Axis, series: Sequence[Series]) -> Table:
    rows = []
    for each in series:
        known = [(point, _both(point)) for point in each.points if math.isfinite(point[1])]
        if each.is_thin or not known:
            continue
        lowest = min(known, key=lambda each: each[0][1])[1]
        rows.append([words(each.name), Cell(f"{len(known):,}", len(known)), *known[0][1], *lowest, *known[-1][1]])
    at = x.label
    columns = ["line", "points", f"first {at}", "first", f"{at} of lowest", "lowest", f"last {at}", "last"]
    return Table(f"{name}-ends", f"{title}: ends of the lines", columns, rows)


def _both(point: tuple[float, float]) -> tuple[Cell, Cell]:
    return tuple(Cell(f"{value:,.5g}", value) for value in point)  # pyright: ignore[reportReturnType]
