"""A split that is ready for training: its tokens, its counts, and a warning about cut and dropped rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import DataError

from .bad_rows import refuse
from .bins import filled_share
from .formats.names import check_renamed
from .settings import RowSettings
from .source_report import SourceReport
from .sources import find_sources
from .tokens import tokenise


@dataclass(frozen=True)
class SplitStatistics:
    """Counts of one split after tokenising, cutting long rows and dropping unusable ones.

    Args:
        rows: Rows that are used.
        tokens: Tokens in these rows, without padding.
        supervised_tokens: Tokens with a loss in these rows.
        truncated_rows: Rows that were longer than ``max_length`` and were cut, dropped rows included.
        dropped_rows: Rows dropped because no supervised token was left.
        longest: Tokens in the longest row before cutting.
        packed_rows: Rows in an epoch after packing; None without packing.
        filled: Share of the positions in an epoch's batches that hold tokens rather than padding; None without packing.
        filled_unpacked: The same share if the rows were not packed; None without packing.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    dropped_rows: int
    longest: int
    packed_rows: int | None = None
    filled: float | None = None
    filled_unpacked: float | None = None

    def with_packing(self, packed: Sequence[Sequence[int]], unpacked: Sequence[Sequence[int]]) -> SplitStatistics:
        """These counts and what packing saves.

        Args:
            packed: The number of tokens of each row, for each batch of an epoch.
            unpacked: The same without packing.
        """
        num_rows = sum(map(len, packed))
        return replace(self, packed_rows=num_rows, filled=filled_share(packed), filled_unpacked=filled_share(unpacked))


def read_split(
    names: str | list[str],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limit: int | None,
    num_proc: int = 1,
) -> tuple[Dataset, list[SourceReport]]:
    """Read all rows of a split as tokens, rows without a loss included, in the order of the sources.

    Args:
        names: Files, globs or hub names.
        split: Name of the split.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows of the sources to read, bad ones included; None reads all.
        num_proc: Processes that tokenise.

    Returns:
        The tokens of the rows that can be used, and what is to be told about each source, bad rows first.

    Raises:
        DataError: If a source cannot be read.
    """
    parts: list[Dataset] = []
    reports: list[SourceReport] = []
    for source in find_sources(names, split):
        left = None if limit is None else limit - sum(report.bad.rows for report in reports)
        if left == 0:
            break
        tokens = tokenise(source, tokenizer, settings, left, num_proc)
        reports.append(report := SourceReport.of(tokens, source.name))
        parts.append(_good(tokens) if report.bad.count else tokens)
    return concatenate_datasets(parts), reports


def read_splits(
    sources: Mapping[str, str | list[str] | None],
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limits: Mapping[str, int | None],
    on_bad_row: str = "error",
    num_proc: int = 1,
) -> tuple[dict[str, Dataset], list[SourceReport]]:
    """Read several splits by `read_split`, and raise one error about all of their bad rows unless these are skipped.

    Raises:
        DataError: If a source cannot be read, or if rows of it cannot be used.
    """
    read: dict[str, Dataset] = {}
    reports: list[SourceReport] = []
    for split, names in sources.items():
        if names is not None:
            read[split], found = read_split(names, split, tokenizer, settings, limits[split], num_proc)
            reports += found
    refuse([report.bad for report in reports], on_bad_row)
    return read, reports


def _good(tokens: Dataset) -> Dataset:
    return tokens.select(numpy.flatnonzero(tokens.data.column("problem").is_null().to_numpy()))


def check_ids(rows: Dataset, vocab_size: int) -> None:
    """Check that the model has an embedding for every token id.

    Raises:
        DataError: If an id is ``vocab_size`` or more. The message names the first such row.
    """
    wrong = numpy.flatnonzero(_column(rows, "largest_id") >= vocab_size)
    if len(wrong):
        row = rows[int(wrong[0])]
        ids = sorted({token for token in row["input_ids"] if token >= vocab_size})
        raise DataError(
            f"{row['place']}: token ids {ids[:5]} are not below the model's vocab_size={vocab_size} "
            f"({len(wrong)} of {len(rows)} rows); the tokenizer belongs to another model."
        )


def check_columns(reports: Sequence[SourceReport], columns: Mapping[str, str]) -> None:
    """Check that every name that the user maps is in a row of one of the sources.

    Raises:
        DataError: If one is not. The message names the nearest name that nothing reads.
    """
    if columns and reports:
        renamed = {name for report in reports for name in report.renamed}
        unused = {name for report in reports for name in report.unused}
        check_renamed(columns, renamed, unused, " and ".join(report.source for report in reports))


def keep_supervised(rows: Dataset, split: str, max_length: int) -> tuple[Dataset, SplitStatistics]:
    """Drop rows without a supervised token, count, and warn about cut and dropped rows.

    Raises:
        DataError: If no row is left.
    """
    length, supervised = _column(rows, "length"), _column(rows, "supervised_tokens")
    kept = numpy.flatnonzero(supervised)
    statistics = SplitStatistics(
        rows=len(kept),
        tokens=int(numpy.minimum(length[kept], max_length).sum()),
        supervised_tokens=int(supervised.sum()),
        truncated_rows=int((length > max_length).sum()),
        dropped_rows=len(rows) - len(kept),
        longest=int(length.max()),
    )
    notes = cut_notes(rows, max_length)
    if not len(kept):
        raise DataError(f"{split}: no row has a supervised token: {'; '.join(notes)}. Raise max_length.")
    if notes:
        rank_zero_warn(f"{split}: {'; '.join(notes)}.", stacklevel=4)
    return (rows.select(kept) if statistics.dropped_rows else rows), statistics


def cut_notes(rows: Dataset, max_length: int) -> list[str]:
    """What a user must know about cut rows and rows without a loss, one phrase for each."""
    length, supervised = _column(rows, "length"), _column(rows, "supervised_tokens")
    counts = {
        f"longer than max_length={max_length} tokens and cut (the longest has {length.max()})": length > max_length,
        "left without a supervised token and dropped": supervised == 0,
        "ending with a turn that is not the assistant's and is not trained on": _column(rows, "open_ended"),
    }
    return [f"{int(true.sum())} of {len(rows)} rows {what}" for what, true in counts.items() if true.any()]


def row_lengths(rows: Dataset, max_length: int) -> numpy.ndarray:
    """Number of tokens of each row after cutting, ``(rows,)``."""
    return numpy.minimum(_column(rows, "length"), max_length)


def _column(rows: Dataset, name: str) -> numpy.ndarray:
    return rows.select_columns(name).with_format("numpy")[:][name]
