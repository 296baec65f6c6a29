"""A split that is ready for training: its tokens, its counts, and a warning about cut and dropped rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import DataError

from .bins import filled_share
from .formats.names import check_renamed
from .settings import RowSettings
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
    names: str | list[str], split: str, tokenizer: PreTrainedTokenizerBase, settings: RowSettings, limit: int | None
) -> Dataset:
    """Read all rows of a split as tokens, unusable rows included, in the order of the sources.

    Args:
        names: Files, globs or hub names.
        split: Name of the split.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows to read; None reads all.

    Raises:
        DataError: If a source cannot be read or a row of it cannot be used.
    """
    parts: list[Dataset] = []
    for source in find_sources(names, split):
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        parts.append(tokenise(source, tokenizer, settings, left))
    return concatenate_datasets(parts)


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


def check_columns(splits: Mapping[str, Dataset], columns: Mapping[str, str]) -> None:
    """Check that every name that the user maps is in a row of one of the splits.

    Raises:
        DataError: If one is not. The message names the nearest name that nothing reads.
    """
    if columns:
        names = {"renamed": set[str](), "unused": set[str]()}
        for name, found in names.items():
            for rows in splits.values():
                found.update(word for words in rows.unique(name) for word in words.split("\n") if word)
        check_renamed(columns, names["renamed"], names["unused"], " and ".join(splits))


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
    notes = _notes(statistics, int(_column(rows, "open_ended").sum()), len(rows), max_length)
    if not len(kept):
        raise DataError(f"{split}: no row has a supervised token: {'; '.join(notes)}. Raise max_length.")
    if notes:
        rank_zero_warn(f"{split}: {'; '.join(notes)}.", stacklevel=4)
    return (rows.select(kept) if statistics.dropped_rows else rows), statistics


def row_lengths(rows: Dataset, max_length: int) -> numpy.ndarray:
    """Number of tokens of each row after cutting, ``(rows,)``."""
    return numpy.minimum(_column(rows, "length"), max_length)


def _notes(statistics: SplitStatistics, open_ended: int, rows: int, max_length: int) -> list[str]:
    cut = f"longer than max_length={max_length} tokens and cut (the longest has {statistics.longest})"
    counts = {
        cut: statistics.truncated_rows,
        "left without a supervised token and dropped": statistics.dropped_rows,
        "ending with a turn that is not the assistant's and is not trained on": open_ended,
    }
    return [f"{count} of {rows} rows {what}" for what, count in counts.items() if count]


def _column(rows: Dataset, name: str) -> numpy.ndarray:
    return rows.select_columns(name).with_format("numpy")[:][name]
