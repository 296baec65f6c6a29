"""SVG as text: elements with escaped attributes and texts, and the marks of series."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

NUM_STYLES = 8
"""Series with different colours, dashes and marks; a further one looks like the first."""
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-4.6L4.4 3.4H-4.4z",
    "M0-5L5 0 0 5-5 0z",
    "M0 4.6L4.4-3.4H-4.4z",
    "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "M-5-2h10v4h-10z",
    "M-2-5h4v10h-4z",
)
"""The outline of the mark of each style, around the origin."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; ``class_`` is ``class``, and other underscores are hyphens. None leaves an attribute out.

    >>> str(tag("text", "a < b", class_="tick", x=1.50))
    '<text class="tick" x="1.5">a &lt; b</text>'
    """
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _text(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, inside)


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """The path of a line through points; it breaks where one is not a number."""
    path, pen = [], "M"
    for x, y in points:
        if x == x and y == y:
            path.append(f"{pen}{_text(x)} {_text(y)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(path)


def _text(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
