"""The word of a verdict, as it is written and coloured everywhere in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.study.report.content import Cell

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
