"""How numbers are shown: one text for a number in HTML, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_lora.study.report.content import Cell

NOTHING = Cell("-")
_SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def words(text: str, tone: str = "") -> Cell:
    """A text."""
    return Cell(text, text, tone)


def nats(value: float | None, places: int = 4) -> Cell:
    """A loss, with four decimals."""
    return NOTHING if value is None else Cell(_plain(value, f"{value:.{places}f}"), value)


def difference(value: float | None, places: int = 4) -> Cell:
    """A difference of losses, with its sign.

    >>> difference(0.03).text, difference(-0.00001).text
    ('+0.0300', '0.0000')
    """
    if value is None:
        return NOTHING
    text = f"{value:+.{places}f}"
    return Cell(_plain(value, text if float(text) else text[1:]), value)


def count(value: float | None) -> Cell:
    """A whole number with commas."""
    return NOTHING if value is None else Cell(_plain(value, f"{value:,.0f}"), value)


def rate(value: float | None) -> Cell:
    """A learning rate: ``3e-4``, ``0.001``."""
    return NOTHING if value is None else Cell(tidy(value), value)


def share(value: float | None, places: int = 1) -> Cell:
    """A share as percents."""
    return NOTHING if value is None else Cell(_plain(value, f"{value:.{places}%}"), value)


def short(value: float | None) -> Cell:
    """A number with three digits."""
    return (
        NOTHING if value is None else Cell(_plain(value, f"{value:,.3g}" if abs(value) < 1e6 else tidy(value)), value)
    )


def p_value(value: float | None) -> Cell:
    """A p-value; how small it is below ``1e-4`` rests on the shape of a distribution that nobody has looked at.

    >>> p_value(0.0123).text, p_value(3e-80).text
    ('0.0123', '< 1e-4')
    """
    return Cell("< 1e-4", value) if value is not None and value < 1e-4 else short(value)


def size(value: float | None) -> Cell:
    """Bytes in the largest unit that fits."""
    if value is None:
        return NOTHING
    unit, name = next(((unit, name) for unit, name in _SIZES if abs(value) >= unit), (1, "bytes"))
    return Cell(f"{value / unit:,.3g} {name}" if value / unit < 1000 else f"{value / unit:,.0f} {name}", value)


def energy(value: float | None) -> Cell:
    """Joules as watt-hours, or kilowatt-hours.

    >>> energy(1800.0).text, energy(7.2e6).text
    ('0.5 Wh', '2 kWh')
    """
    if value is None:
        return NOTHING
    hours = value / 3600
    return Cell(f"{hours:.3g} Wh" if hours < 1000 else f"{hours / 1000:,.3g} kWh", value)


def seconds(value: float | None) -> Cell:
    """A time: ``42 s``, ``3 min 20 s``, ``2 h 5 min``.

    >>> seconds(42.3).text, seconds(200).text, seconds(7500).text
    ('42.3 s', '3 min 20 s', '2 h 5 min')
    """
    if value is None:
        return NOTHING
    if value < 60:
        return Cell(f"{value:.3g} s", value)
    whole = round(value)
    minutes, rest = divmod(whole, 60)
    large, small = (f"{minutes} min", f"{rest} s") if whole < 3600 else (f"{minutes // 60} h", f"{minutes % 60} min")
    return Cell(f"{large} {small}" if small[0] != "0" else large, value)


def tidy(value: float) -> str:
    """A number as short as it can be told, with four digits at most.

    >>> [tidy(value) for value in (0.0003, 0.25, 1500, 2_000_000)]
    ['3e-4', '0.25', '1,500', '2M']
    """
    if not math.isfinite(value):
        return str(value)
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _plain(value: float, text: str) -> str:
    return text if math.isfinite(value) else "not a number" if math.isnan(value) else "infinite"


WORDS = {
    "matches": ("matches", "good"),
    "behind": ("falls behind", "bad"),
    "ahead": ("is ahead", "better"),
    "cannot tell": ("cannot tell", "open"),
}
"""Word of a verdict to how it is written, and its tone."""


def word_cell(verdict: Mapping[str, Any]) -> Cell:
    """The word of a verdict in its colour."""
    word, tone = WORDS.get(str(verdict["verdict"]), (str(verdict["verdict"]), ""))
    return Cell(word, word, tone)
