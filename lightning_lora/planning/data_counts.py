"""What a data module holds: rows, supervised tokens, and what is lost or repeated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataCounts:
    """Counts of the training rows, read exactly as training reads them.

    Args:
        unit: What a row is trained on: ``"tokens"``, ``"labels"``, or ``"unknown"`` where nothing is known of the
            targets (regression): the numbers of targets and bits are then None.
        rows: Rows of one epoch.
        supervised_tokens: Tokens (or labels) with a loss in one epoch; None if unknown.
        unique_supervised_tokens: The same without repeated rows; None if unknown.
        bits: Upper bound on the information of the unique targets: 1 bit for a token, the entropy of the counted
            labels for a label; None if unknown.
        duplicate_rows: Rows that repeat an earlier row.
        truncated_rows: Rows that are cut at ``max_length``.
        unsupervised_rows: Rows without any target.
        longest_row: Tokens of the longest row as trained; None if rows are no token sequences.
        mean_row: Mean tokens of a row; None likewise.
        compressed_bits: Size of the unique targets after compression, bits; None if rows are no token sequences.
    """

    unit: str
    rows: int
    supervised_tokens: int | None
    unique_supervised_tokens: int | None
    bits: float | None
    duplicate_rows: int
    truncated_rows: int
    unsupervised_rows: int
    longest_row: int | None = None
    mean_row: float | None = None
    compressed_bits: int | None = None
