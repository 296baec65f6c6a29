"""What the rows of a source have in common that a user must know, told once per source and by one process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lora.data.bad_rows import BadRows, plural_rows
from lightning_lora.errors import first_five


@dataclass
class SourceReport:
    """Counts of what is told about a source. Memory grows with the things told, not with the rows.

    Args:
        source: Name of the file or hub dataset.
    """

    source: str
    bad: BadRows = field(init=False)
    rows: int = 0
    renamed: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.bad = BadRows(self.source)

    @classmethod
    def of(cls, tokens: Dataset, source: str) -> SourceReport:
        """Count all tokens of a source, as `tokens.tokenise` returns them."""
        report = cls(source)
        for batch in tokens.data.to_batches():
            report.add(pyarrow.table(batch))
        return report

    def add(self, table: pyarrow.Table) -> None:
        """Count the next table of the source."""
        self.bad.add_table(table)
        self.rows += table["problem"].null_count  # a bad row has a problem
        for column, counts in (("renamed", self.renamed), ("unused", self.unused), ("notes", self.notes)):
            for pair in table[column].combine_chunks().flatten().value_counts().to_pylist():
                counts[pair["values"]] += pair["counts"]

    def tell(self) -> None:
        """Warn about rows left out, about columns and keys that nothing reads, and about what else was noted."""
        read = self.bad.rows - self.bad.count
        if self.bad.count:
            self._warn(f"{self.bad.count:,} of {plural_rows(self.bad.rows)} left out (on_bad_row: skip). {self.bad}")
        if self.unused:
            names = first_five(f"{name!r} ({plural_rows(count)})" for name, count in self.unused.most_common())
            self._warn(f"nothing reads {names}. Remove what is not needed, or map it to a known column with columns=.")
        for note, count in self.notes.most_common():
            self._warn(f"{count:,} of {plural_rows(self.rows)}: {note}")
        if self.rows > read:
            chats = f"{read:,} conversation{'s' * (read != 1)}"
            rank_zero_info(f"{self.source}: {chats} became {plural_rows(self.rows)}, one for each answer")

    def tell_new(self, told: set[str]) -> None:
        """Warn about what was not ``told`` before, for rows that are used while they are still being read."""
        bad = {f"a row is left out (on_bad_row: skip): {kind.first}": name for name, kind in self.bad.kinds.items()}
        unused = {f"nothing reads {name!r}": name for name in self.unused}
        notes = {f"at least one row: {note}": note for note in self.notes}
        for text, key in [*bad.items(), *unused.items(), *notes.items()]:
            if (name := f"{self.source}: {key}") not in told:
                told.add(name)
                self._warn(text)

    def _warn(self, text: str) -> None:
        rank_zero_warn(f"{self.source}: {text}", stacklevel=6)
