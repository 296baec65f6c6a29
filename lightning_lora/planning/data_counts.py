"""What a data module holds: rows, supervised tokens, and what is lost or repeated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataCounts:
    """Counts of the training rows, read exactly as training reads them.

    Args:
        unit: What a row is trained on: ``"tokens"``, ``"labels"``, or ``"unknown"`` where nothing is known of the
            targets (regression): the numbers of targets and bits are then None.
        rows: Rows of one epoch, before packing; None for a stream of unknown length, of which nothing else is known.
        supervised_tokens: Tokens (or labels) with a loss in one epoch; None if unknown.
        unique_supervised_tokens: The same without repeated rows; None if unknown.
        bits: Information of the unique targets: 1 bit for a token, which is an assumption (`measure_base_bits` measures
            it), and for a label the entropy of the counted labels, an upper bound; None if unknown.
        duplicate_rows: Rows that repeat an earlier row; None if nobody looked.
        truncated_rows: Rows that are cut at ``max_length``.
        unsupervised_rows: Rows without any target.
        longest_row: Tokens of the longest row after cutting, before packing; None if rows are no token sequences.
        mean_row: Mean tokens of a row; None likewise.
        packed_rows: Rows of the batches of one epoch; None without packing.
        longest_packed_row: Tokens of the longest of these; None without packing.
        counted_rows: Rows that were read; fewer than ``rows`` if reading all would take too long, and then the numbers
            of targets and bits are scaled up from these.
        num_classes: Number of different labels that were counted; None if targets are no labels.
    """

    unit: str
    rows: int | None
    supervised_tokens: int | None
    unique_supervised_tokens: int | None
    bits: float | None
    duplicate_rows: int | None
    truncated_rows: int
    unsupervised_rows: int
    longest_row: int | None = None
    mean_row: float | None = None
    packed_rows: int | None = None
    longest_packed_row: int | None = None
    counted_rows: int | None = None
    num_classes: int | None = None

    def remarks(self) -> list[str]:
        """What is lost or repeated, a sentence each; none if every row is used whole and once."""
        if self.rows is None:
            return ["The rows are streamed and max_rows is not set, so they cannot be counted before training."]
        lines = []
        if self.rows > 1 and self.duplicate_rows == self.rows - 1:
            lines.append(f"All {self.rows:,} rows are the same row, which counts once.")
        elif self.duplicate_rows:
            lines.append(f"{self.duplicate_rows:,} of {self.rows:,} rows repeat an earlier one, which counts once.")
        if self.truncated_rows:
            lines.append(f"{self.truncated_rows:,} rows are cut at max_length and lose what comes after it.")
        if self.unsupervised_rows:
            lines.append(f"{self.unsupervised_rows:,} rows have nothing to learn (no target) and are left out.")
        if self.counted_rows is not None and self.counted_rows < self.rows:
            lines.append(f"{self.counted_rows:,} of {self.rows:,} rows were read; the counts are scaled up from these.")
        return lines


def without_counts(unit: str, rows: int | None) -> DataCounts:
    """The counts of data of which no more than the number of rows is known."""
    return DataCounts(unit, rows, None, None, None, None, 0, 0)
