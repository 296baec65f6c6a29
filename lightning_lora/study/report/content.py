"""What a report is made of, before it becomes HTML, Markdown or CSV: every number is there with its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from markupsafe import Markup

_LONG_TEXT = 28


@dataclass(frozen=True)
class Cell:
    """A value and how it is shown; everywhere in a report the same text.

    Args:
        text: How it is shown.
        value: The number itself, or the text; None where there is none.
        tone: Class of a table cell, such as ``"heat-3"``.
    """

    text: str
    value: float | str | None = None
    tone: str = ""

    @property
    def is_number(self) -> bool:
        """Whether it is right-aligned."""
        return isinstance(self.value, (int, float))


@dataclass(frozen=True)
class Words:
    """A paragraph.

    Args:
        cells: Name to number, for numbers of the text.
        tone: ``""``, or ``"note"`` for what limits something else.
    """

    text: str
    cells: Mapping[str, Cell] = field(default_factory=dict)
    tone: str = ""
    kind: str = "words"


def said(form: str, **cells: Cell) -> Words:
    """A paragraph in which ``{name}`` stands for a number.

    >>> said("{steps} steps", steps=Cell("1,000", 1000)).text
    '1,000 steps'
    """
    return Words(form.format(**{name: cell.text for name, cell in cells.items()}), cells)


@dataclass(frozen=True)
class Table:
    """A table. The first cell of each row names the row.

    Args:
        name: Its name in the CSV and in links.
        columns: Heads of the columns.
        rows: Rows of cells.
        note: A remark below it.
        is_folded: Whether it is shown when asked for.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    is_folded: bool = False
    kind: str = "table"

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, or nothing at all, and nothing else that has a value."""
        columns = [[row[at] for row in self.rows] for at in range(len(self.columns))]
        return [all(cell.is_number or cell.value is None for cell in column) for column in columns]

    @property
    def long(self) -> list[bool]:
        """Whether a column has texts that need room: a narrow screen would break them after each word."""
        return [any(len(row[at].text) > _LONG_TEXT for row in self.rows) for at in range(len(self.columns))]


@dataclass(frozen=True)
class Figure:
    """A chart.

    Args:
        name: Its name in the CSV and in links.
        says: Its result in words, for who does not see it.
        svg: The drawing.
        legend: Name of each series.
        table: The numbers that matter most.
        points: Series to its points ``(x, y)``, for the CSV.
        script: What the script needs to zoom; None for a chart that does not move.
        x: Name of the horizontal axis.
        choice: Words on the button that shows this figure in the place of its neighbours.
        styles: Style of each series of the legend.
        off: Numbers of the series of the legend that are shown when asked for.
    """

    name: str
    title: str
    says: str
    svg: Markup
    legend: Sequence[str]
    table: Table
    points: Mapping[str, Sequence[tuple[float, float]]]
    script: Mapping[str, Any] | None = None
    x: str = "x"
    choice: str = ""
    styles: Sequence[int] = ()
    off: Sequence[int] = ()
    kind: str = "figure"


@dataclass(frozen=True)
class Choice:
    """Figures of the same thing: the script shows one at a time, without it all are there."""

    name: str
    figures: Sequence[Figure]
    kind: str = "choice"


@dataclass(frozen=True)
class Listing:
    """Text to copy: commands, a config.

    Args:
        is_folded: Whether it is shown when asked for.
    """

    caption: str
    text: str
    is_folded: bool = False
    kind: str = "listing"


Block: TypeAlias = Words | Table | Figure | Choice | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page with a title."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        subject: Name of the run or study, for the title of the window.
        verdict: The main result in one sentence.
        lede: What else has to be known at once.
        state: ``"running"`` or ``"unfinished"``; "" for what has ended.
        word: The verdict in a word or two, which is seen first.
        tone: How the word looks: ``"good"``, ``"bad"``, ``"better"``, or ``"open"``.
        figure: The picture that shows the main result.
    """

    subject: str
    verdict: Words
    lede: Sequence[Words]
    sections: Sequence[Section]
    state: str = ""
    word: str = ""
    tone: str = "open"
    figure: Figure | None = None


def figures_of(page: Page) -> list[Figure]:
    """All charts of a page, in order."""
    found: list[Figure] = [] if page.figure is None else [page.figure]
    for section in page.sections:
        for block in section.blocks:
            found += block.figures if isinstance(block, Choice) else [block] if isinstance(block, Figure) else []
    return found


_HIDDEN = (
    *range(0x00, 0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
    *(0xFFFE, 0xFFFF),
)
_WRITTEN = {code: f"[U+{code:04X}]" for code in _HIDDEN} | {0x0D: " "}


def visible(text: str) -> str:
    r"""The text with such characters as ``[U+202E]``; a name cannot turn the words beside it around.

    >>> visible("rank 8 \u202egnp")
    'rank 8 [U+202E]gnp'
    """
    return text.translate(_WRITTEN)
