"""Rows that cannot be used: what is wrong with each, how many there are of each kind, and what is done about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute

from lightning_lora.errors import DataError, DataSettingError, check_choice

ACTIONS = ("error", "skip")
_KINDS_TOLD = 10


class RowError(DataError):
    """One row cannot be used.

    Correct the row, or leave such rows out by `on_bad_row: skip`.

    Args:
        place: The row, and the part of it, for the message.
        kind: What is wrong, in the same words for every row with this fault. It may name columns, roles and limits,
            never a value of the row.
        detail: What this row holds, appended to the message.
    """

    code = "LL406"
    page = "use/data.md#bad-rows-caches-large-data"

    def __init__(self, place: str, kind: str, detail: str = "") -> None:
        super().__init__(f"{place}: {kind}{detail}")
        self.place = place
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the error be sent to another process; the default would call the class with the message alone."""
        return type(self), (self.place, self.kind, self.detail)


class Kind(NamedTuple):
    """The rows with one fault: how many there are, and the message about the first of them."""

    rows: int
    first: str


@dataclass
class BadRows:
    """Counts of the rows of one source that cannot be used. Memory grows with the kinds of faults, not with the rows.

    Args:
        source: Name of the file or hub dataset.
        rows: Rows that were read, bad ones included.
        kinds: The faults found, in the order of their first rows.
    """

    source: str
    rows: int = 0
    kinds: dict[str, Kind] = field(default_factory=dict)

    def add(self, error: RowError) -> None:
        """Count one more bad row."""
        self._add(error.kind, 1, str(error))

    def add_table(self, table: pyarrow.Table) -> None:
        """Count the rows, and the bad ones, of the next table of the source (its columns: `token_table.COLUMNS`)."""
        if len(table):
            self.rows = table["record"][-1].as_py() + 1
        problems = table["problem"].combine_chunks()
        for pair in problems.drop_null().value_counts().to_pylist():
            row = table.slice(pyarrow.compute.index(problems, pair["values"]).as_py(), 1).to_pylist()[0]
            self._add(pair["values"], pair["counts"], str(RowError(row["place"], row["problem"], row["detail"])))

    def _add(self, kind: str, count: int, first: str) -> None:
        known = self.kinds.get(kind, Kind(0, first))
        self.kinds[kind] = known._replace(rows=known.rows + count)

    @property
    def count(self) -> int:
        """Number of bad rows."""
        return sum(kind.rows for kind in self.kinds.values())

    def __str__(self) -> str:
        """What is wrong: the message of a single bad row, otherwise a line for each kind with its first row."""
        if self.count == 1:
            return next(iter(self.kinds.values())).first
        kinds = sorted(self.kinds.values(), key=lambda kind: -kind.rows)
        told, rest = kinds[:_KINDS_TOLD], kinds[_KINDS_TOLD:]
        lines = [f"  {plural_rows(kind.rows)}{', the first' * (kind.rows > 1)}: {kind.first}" for kind in told]
        if rest:
            lines.append(f"  {plural_rows(sum(kind.rows for kind in rest))} with {len(rest)} further faults")
        return f"{self.source}: {self.count:,} of {plural_rows(self.rows)} cannot be used:\n" + "\n".join(lines)


def check_action(on_bad_row: str) -> str:
    """Check what is to be done about bad rows.

    Raises:
        ConfigError: If it is neither ``"error"`` nor ``"skip"``.
    """
    check_choice("on_bad_row", on_bad_row, ACTIONS, DataSettingError)
    return on_bad_row


def refuse(found: Sequence[BadRows], on_bad_row: str) -> None:
    """Raise one error about all bad rows of all sources, unless they are skipped and every source has others.

    Raises:
        DataError: If there are bad rows and ``on_bad_row`` is ``"error"``, or if all rows of a source are bad.
    """
    useless = [one for one in found if one.count and one.count == one.rows]
    bad = useless if on_bad_row == "skip" else [one for one in found if one.count]
    if bad:
        raise DataError("\n".join([*map(str, bad), *([_ADVICE] if bad != useless else [])]))


def plural_rows(count: int) -> str:
    """A number of rows in words."""
    return f"{count:,} row{'s' * (count != 1)}"


_ADVICE = "Mend or remove such rows, or leave them out with on_bad_row: skip."
