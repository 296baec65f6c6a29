"""A split that is ready for training: its tokens, its counts, and a warning about cut and dropped rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.data.batches.bins import filled_share
from lightning_lora.data.sampling.mixture import Mixture
from lightning_lora.errors import DataError, DataSettingError


@dataclass(frozen=True)
class SourceCounts:
    """Counts of one source of a split.

    Args:
        rows: Rows that can be used.
        epoch_rows: Rows of an epoch. They are fewer than ``rows`` if sources are mixed by shares.
    """

    rows: int
    epoch_rows: int


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
        weightless_rows: Rows dropped because their weight is 0.
        sources: The counts of each source, by the name that was given.
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
    weightless_rows: int = 0
    sources: Mapping[str, SourceCounts] = field(default_factory=dict, compare=False)

    def with_packing(self, packed: Sequence[Sequence[int]], unpacked: Sequence[Sequence[int]]) -> SplitStatistics:
        """These counts and what packing saves.

        Args:
            packed: The number of tokens of each row, for each batch of an epoch.
            unpacked: The same without packing.
        """
        num_rows = sum(map(len, packed))
        return replace(self, packed_rows=num_rows, filled=filled_share(packed), filled_unpacked=filled_share(unpacked))

    def with_mixture(self, mixture: Mixture) -> SplitStatistics:
        """These counts and the rows of each source in an epoch."""
        pairs = zip(self.sources.items(), mixture.counts, strict=True)
        return replace(self, sources={name: replace(counts, epoch_rows=rows) for (name, counts), rows in pairs})


def check_ids(rows: Dataset, vocab_size: int) -> None:
    """Check that the model has an embedding for every token id.

    Raises:
        DataError: If an id is ``vocab_size`` or more. The message names the first such row.
    """
    wrong = numpy.flatnonzero(column(rows, "largest_id") >= vocab_size)
    if len(wrong):
        row = rows[int(wrong[0])]
        ids = sorted({token for token in row["input_ids"] if token >= vocab_size})
        raise DataError(
            f"{row['place']}: token ids {ids[:5]} are not below the model's vocab_size={vocab_size} "
            f"({len(wrong)} of {len(rows)} rows); the tokenizer belongs to another model."
        )


def check_context(rows: Dataset, split: str, max_length: int, context: int | None, whose: str) -> None:
    """Check that no row is longer than the model's context.

    Args:
        rows: Rows of tokens.
        split: Name of the split.
        max_length: Tokens kept of each row.
        context: Most tokens that the model was made for; None if it is not known, or not limited.
        whose: What says so, for the message.

    Raises:
        ConfigError: If a row is longer.
    """
    lengths = row_lengths(rows, max_length)
    if context is not None and (longer := int((lengths > context).sum())):
        raise DataSettingError(
            f"max_length={max_length} is above the context of {whose}, {context} tokens, and {longer} of {len(rows)} "
            f"{split} rows are longer than that (the longest has {lengths.max()}). Set max_length={context} to cut "
            "them, or beyond_context=true to train on positions that the model has never seen."
        )


def keep_supervised(
    rows: Dataset, split: str, max_length: int, names: Sequence[str] = ()
) -> tuple[Dataset, SplitStatistics]:
    """Drop rows without a supervised token or of weight 0, count, and warn about cut and dropped rows.

    Args:
        rows: Rows of tokens, as `read_split` returns them.
        split: Name of the split.
        max_length: Tokens kept of each row.
        names: The different names of the sources.

    Raises:
        DataError: If no row is left.
    """
    length, supervised, weighs = column(rows, "length"), column(rows, "supervised_tokens"), column(rows, "weight") > 0
    kept = numpy.flatnonzero((supervised > 0) & weighs)
    of_sources = numpy.bincount(column(rows, "source")[kept], minlength=len(names)).tolist()
    statistics = SplitStatistics(
        rows=len(kept),
        tokens=int(numpy.minimum(length[kept], max_length).sum()),
        supervised_tokens=int(supervised[kept].sum()),
        truncated_rows=int((length > max_length).sum()),
        dropped_rows=int((supervised == 0).sum()),
        longest=int(length.max()),
        weightless_rows=int(((supervised > 0) & ~weighs).sum()),
        sources={name: SourceCounts(count, count) for name, count in zip(names, of_sources, strict=False)},
    )
    notes = cut_notes(rows, max_length)
    if not len(kept):
        raise DataError(f"{split}: no row has a supervised token: {'; '.join(notes)}. {_advice(statistics)}")
    if notes:
        rank_zero_warn(f"{split}: {'; '.join(notes)}.", stacklevel=4)
    return (rows if len(kept) == len(rows) else rows.select(kept)), statistics


def cut_notes(rows: Dataset, max_length: int) -> list[str]:
    """What a user must know about cut rows and rows without a loss, one phrase for each."""
    length, supervised, weights = (column(rows, name) for name in ("length", "supervised_tokens", "weight"))
    counts = {
        f"longer than max_length={max_length} tokens and cut (the longest has {length.max()})": length > max_length,
        "left without a supervised token and dropped": supervised == 0,
        "of weight 0 and dropped": (supervised > 0) & (weights == 0),
        "ending with a turn that is not the assistant's and is not trained on": column(rows, "open_ended"),
    }
    return [f"{int(true.sum())} of {len(rows)} rows {what}" for what, true in counts.items() if true.any()]


def row_lengths(rows: Dataset, max_length: int) -> numpy.ndarray:
    """Number of tokens of each row after cutting, ``(rows,)``."""
    return numpy.minimum(column(rows, "length"), max_length)


def _advice(statistics: SplitStatistics) -> str:
    return "Raise max_length." if statistics.truncated_rows else "Give other rows."


def column(rows: Dataset, name: str) -> numpy.ndarray:
    """All values of a column."""
    return rows.data.column(name).to_numpy()[stored_places(rows)]


def stored_places(rows: Dataset) -> numpy.ndarray | slice:
    """Where the rows of a dataset are in the table that it selects from.

    datasets would take each row of a selection by itself: seconds for 100,000 rows.
    """
    return slice(None) if rows._indices is None else rows._indices.column(0).to_numpy()
