"""One row while it is read: its columns under known names, and which of them nothing has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.data.formats.names import COLUMNS, KEYS, rename
from lightning_lora.data.reading import Row
from lightning_lora.data.settings import RowSettings


class NamedRow:
    """The columns of a row, and a note of every name that is used.

    Args:
        row: The row as it was read.
        settings: How rows become tokens.

    Attributes:
        place: File and row, for messages.
        columns: Values by known name.
        unused: The user's names of columns, and keys of messages, that nothing reads.
        renamed: Names of ``settings.columns`` that the row has.
    """

    def __init__(self, row: Row, settings: RowSettings) -> None:
        self.place = row.place
        self.unused: set[str] = set()
        self.renamed: set[str] = set()
        self.columns, self._own, self._keys = row.columns, {}, {}
        self._taken: set[str] = set()
        if settings.columns:
            self._keys = {own: known for own, known in settings.columns.items() if known in KEYS}
            names = {own: known for own, known in settings.columns.items() if known in COLUMNS}
            self.columns, self._own = self._renamed(row.columns, names, self.place)

    def take(self, column: str) -> Any:
        """The value of a column, None if it is absent or empty; the column counts as read."""
        self._taken.add(column)
        value = self.columns.get(column)
        return None if isinstance(value, str) and not value.strip() else value

    def message_keys(self, message: dict[str, Any], place: str) -> dict[str, Any]:
        """A message with its keys under known names."""
        return self._renamed(message, self._keys, place)[0] if self._keys else message

    def leave(self, column: str) -> None:
        """Note that a column was read and is not used."""
        self._taken.discard(column)

    def left(self) -> frozenset[str]:
        """Names of filled columns that nothing has read, and `unused`."""
        if not self.unused and self.columns.keys() <= self._taken:
            return frozenset()
        columns = (name for name, value in self.columns.items() if name not in self._taken and value not in (None, ""))
        return frozenset([*self.unused, *(self._own.get(name, name) for name in columns)])

    def _renamed(
        self, values: Mapping[str, Any], names: Mapping[str, str], place: str
    ) -> tuple[dict[str, Any], dict[str, str]]:
        renamed, own = rename(values, names, place)
        self.renamed.update(own.values())
        self.unused.update(known for known in own if known not in names and values.get(known) is not None)
        return renamed, own
