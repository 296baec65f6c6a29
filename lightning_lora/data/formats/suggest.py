"""What to write for columns that fit no known format."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from lightning_lora.data.formats.names import COLUMNS, FORMATS

_ALSO = {
    "question": ("query", "problem", "q", "ask"),
    "answer": ("response", "reply", "solution", "target", "a", "label"),
    "messages": ("dialog", "dialogue", "conversation", "chat", "turns"),
    "text": ("content", "document", "body", "article"),
}
"""Other names that data sets use."""


def suggest_names(columns: Iterable[str]) -> dict[str, str]:
    """The mapping that would make a known format of the columns, with the nearest known names; empty without columns.

    >>> suggest_names(["frage", "antwort"])
    {'frage': 'question', 'antwort': 'answer'}
    >>> suggest_names(["promt", "completion", "id"])
    {'promt': 'prompt'}
    """
    columns = list(columns)
    best: tuple[float, dict[str, str]] = (-1.0, {})
    # Question and answer come first: the plainest names, for columns that resemble none.
    for wanted in sorted(FORMATS, key=lambda names: names != ("question", "answer")):
        if len(wanted) <= len(columns):
            best = max(best, _assigned(wanted, columns), key=lambda found: found[0])
    return {own: known for own, known in best[1].items() if own != known}


def _assigned(wanted: tuple[str, ...], columns: list[str]) -> tuple[float, dict[str, str]]:
    """How near the columns are to the wanted ones, and the column that would be each; order decides among strangers."""
    # Columns that mean something beside the wanted ones are taken last.
    strangers = sorted(columns, key=lambda own: own in COLUMNS)
    pairs = sorted(((_nearness(own, known), own, known) for own in columns for known in wanted), reverse=True)
    own_of: dict[str, str] = {}
    total = 0.0
    for near, own, known in pairs:
        if near and known not in own_of and own not in own_of.values():
            own_of[known] = own
            total += near
    for known in wanted:
        if known not in own_of:
            own_of[known] = next(own for own in strangers if own not in own_of.values())
    return total / len(wanted), {own_of[known]: known for known in wanted}


def _nearness(own: str, known: str) -> float:
    if own == known:
        return 2.0
    if own.lower() in _ALSO.get(known, ()) or own.lower() == known:
        return 1.0
    near = SequenceMatcher(None, own.lower(), known).ratio()
    return near if near >= 0.6 else 0.0
