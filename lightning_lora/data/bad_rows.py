"""Rows that cannot be used: one error for each, which says of what kind it is."""

from __future__ import annotations

from lightning_lora.errors import DataError


class RowError(DataError):
    """One row cannot be used.

    Args:
        place: The row, and the part of it, for the message.
        kind: What is wrong, in the same words for every row with this fault. It may name columns, roles and limits,
            never a value of the row.
        detail: What this row holds, appended to the message.
    """

    def __init__(self, place: str, kind: str, detail: str = "") -> None:
        super().__init__(f"{place}: {kind}{detail}")
        self.place = place
        self.kind = kind
