"""A report as Markdown: the same words and tables, without pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightning_lora.study.report.content import Block, Choice, Figure, Listing, Page, Table, Words, visible


def to_markdown(page: Page, made: str) -> str:
    """The text of ``report.md``."""
    lines = [f"# {_text(page.verdict.text)}", "", *(f"{_text(words.text)}\n" for words in page.lede)]
    lines += [] if page.figure is None else list(_block(page.figure))
    for section in page.sections:
        lines += [f"## {_text(section.title)}", ""]
        for block in section.blocks:
            lines += _block(block)
    return "\n".join([*lines, _text(made), ""])


def _block(block: Block) -> Iterator[str]:
    match block:
        case Words():
            yield f"{_text(block.text)}\n"
        case Table():
            yield from _table(block)
        case Figure():
            yield f"{_text(block.title)}: {_text(block.says)}\n"
            yield from _table(block.table)
        case Choice():
            yield from _block(block.figures[0])
        case Listing():
            yield f"{_text(block.caption)}:\n"
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            yield f"{fence}text\n{visible(block.text)}\n{fence}\n"


def _table(table: Table) -> Iterator[str]:
    yield f"{_text(table.caption)}\n"
    yield f"| {' | '.join(map(_text, table.columns))} |"
    yield f"|{'|'.join('---:' if number else '---' for number in table.numeric)}|"
    for row in table.rows:
        yield f"| {' | '.join(_text(cell.text) for cell in row)} |"
    yield f"\n{_text(table.note)}\n" if table.note else ""


def _text(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(visible(text).split()))
