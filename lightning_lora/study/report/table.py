"""Every number of a report as CSV: where it is, the number itself, and how the report shows it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from lightning_lora.study.report.content import Cell, Choice, Figure, Page, Table, Words, visible

COLUMNS = ("part", "row", "column", "value", "shown")


def to_csv(page: Page) -> str:
    """The lines of ``report.csv``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part, row, column, cell in cells_of(page):
        value = "" if cell.value is None else repr(cell.value) if cell.is_number else _safe(str(cell.value))
        writer.writerow([_safe(part), _safe(row), _safe(column), value, _safe(cell.text)])
    return text.getvalue()


def cells_of(page: Page) -> Iterator[tuple[str, str, str, Cell]]:
    """Part, row and column of every number and sentence of a page, with its cell."""
    yield from _sentence("verdict", 0, page.verdict)
    for number, words in enumerate(page.lede, 1):
        yield from _sentence("verdict", number, words)
    if page.figure is not None:
        yield from _figure(page.figure)
    for section in page.sections:
        for number, block in enumerate(section.blocks):
            match block:
                case Words():
                    yield from _sentence(section.name, number, block)
                case Table():
                    yield from _table(block)
                case Figure():
                    yield from _figure(block)
                case Choice():
                    for figure in block.figures:
                        yield from _figure(figure)


def _sentence(part: str, number: int, words: Words) -> Iterator[tuple[str, str, str, Cell]]:
    yield part, f"sentence {number}", "", Cell(words.text, words.text)
    for name, cell in words.cells.items():
        yield part, f"sentence {number}", name, cell


def _table(table: Table) -> Iterator[tuple[str, str, str, Cell]]:
    for row in table.rows:
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            yield table.name, row[0].text, column, cell


def _figure(figure: Figure) -> Iterator[tuple[str, str, str, Cell]]:
    yield from _table(figure.table)
    yield figure.name, "says", "", Cell(figure.says, figure.says)
    for series, points in figure.points.items():
        for x, y in points:
            yield figure.name, series, f"{x:.6g}", Cell(f"{y:.5g}", y)


def _safe(text: str) -> str:
    """A text with a quote in front of what a spreadsheet would compute; a line break is a space."""
    text = " ".join(visible(text).split("\n"))
    return f"'{text}" if re.match(r"'?[=+\-@\t\r]", text) and not re.fullmatch(r"-|[-+]?[\d.,]+\S*", text) else text
