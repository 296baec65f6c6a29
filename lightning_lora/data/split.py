"""A split ready for training: tokens, counts, and a warning of what was cut or left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import DataError

from .sources import find_sources
from .tokens import tokenise


@dataclass(frozen=True)
class SplitStatistics:
    """What one split holds after tokenising, cutting and leaving out.

    Args:
        rows: Rows that are used.
        tokens: Tokens in these rows, padding not counted.
        supervised_tokens: Tokens with loss in these rows.
        truncated_rows: Rows used or dropped that were longer than ``max_length`` and were cut.
        dropped_rows: Rows left out because no token with loss remained.
        longest: Tokens in the longest row before cutting.
        packed_rows: Rows of an epoch after packing; ``None`` where nothing is packed.
        filled: Share of the places in an epoch's batches that hold tokens rather than padding, as packed.
        filled_unpacked: The same without packing.
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


def read_split(
    names: str | list[str], split: str, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None
) -> Dataset:
    """All rows of a split as tokens, unusable ones included, in the order of the sources.

    Raises:
        DataError: If a source cannot be read or a row of it cannot be used.
    """
    parts: list[Dataset] = []
    for source in find_sources(names, split):
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        parts.append(tokenise(source, tokenizer, max_length, left))
    return concatenate_datasets(parts)


def check_ids(rows: Dataset, vocab_size: int) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        DataError: If an id is ``vocab_size`` or more, naming the first row.
    """
    wrong = numpy.flatnonzero(_column(rows, "largest_id") >= vocab_size)
    if len(wrong):
        row = rows[int(wrong[0])]
        ids = sorted({token for token in row["input_ids"] if token >= vocab_size})
        raise DataError(
            f"{row['place']}: token ids {ids[:5]} are not below the model's vocab_size={vocab_size} "
            f"({len(wrong)} of {len(rows)} rows); the tokenizer belongs to another model."
        )


def keep_supervised(rows: Dataset, split: str, max_length: int) -> tuple[Dataset, SplitStatistics]:
    """The rows with something to train on, and the counts; warns of rows that were cut or left out.

    Raises:
        DataError: If no row is left.
    """
    length, trained = _column(rows, "length"), _column(rows, "trained")
    kept = numpy.flatnonzero(trained)
    statistics = SplitStatistics(
        rows=len(kept),
        tokens=int(numpy.minimum(length[kept], max_length).sum()),
        supervised_tokens=int(trained.sum()),
        truncated_rows=int((length > max_length).sum()),
        dropped_rows=len(rows) - len(kept),
        longest=int(length.max()),
    )
    counts = _counts(statistics, int(_column(rows, "open_ended").sum()), len(rows), max_length)
    if not len(kept):
        raise DataError(f"{split}: no row has a token to train on: {'; '.join(counts)}. Raise max_length.")
    if counts:
        rank_zero_warn(f"{split}: {'; '.join(counts)}.", stacklevel=4)
    return (rows.select(kept) if statistics.dropped_rows else rows), statistics


def row_lengths(rows: Dataset, max_length: int) -> numpy.ndarray:
    """Tokens of each row as it is used, ``(rows,)``."""
    return numpy.minimum(_column(rows, "length"), max_length)


def _counts(statistics: SplitStatistics, open_ended: int, rows: int, max_length: int) -> list[str]:
    cut = f"longer than max_length={max_length} tokens and cut (the longest has {statistics.longest})"
    counts = {
        cut: statistics.truncated_rows,
        "left without a token to train on and dropped": statistics.dropped_rows,
        "ending with another turn than the assistant's, which is not trained on": open_ended,
    }
    return [f"{count} of {rows} rows {what}" for what, count in counts.items() if count]


def _column(rows: Dataset, name: str) -> numpy.ndarray:
    return rows.select_columns(name).with_format("numpy")[:][name]
