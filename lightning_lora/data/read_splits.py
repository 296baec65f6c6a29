"""Reading of splits: the tokens of all their sources, and what is told about each source."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import refuse
from lightning_lora.data.formats.names import check_renamed
from lightning_lora.data.sampling.mixture import Shares
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.source_report import SourceReport
from lightning_lora.data.sources import find_sources
from lightning_lora.data.split import column, stored_places
from lightning_lora.data.tokens import tokenise


def source_names(given: Any) -> list[str]:
    """The names of the sources of a split, in the order given."""
    return [os.fspath(name) for name in ([given] if isinstance(given, (str, os.PathLike)) else given)]


def read_split(
    names: str | list[str] | Mapping[str, float],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limit: int | None,
    shares: Shares | None = None,
    num_proc: int = 1,
) -> tuple[Dataset, list[SourceReport]]:
    """Read all rows of a split as tokens, rows without a loss included, in the order of the sources.

    Args:
        names: Files, globs or hub names.
        split: Name of the split.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows of the sources to read, bad ones included; None reads all.
        shares: The share of each source in the limit; None reads the first sources first.
        num_proc: Processes that tokenise.

    Returns:
        The tokens of the rows that can be used, with the columns of `token_table.COLUMNS`, ``source``, the index of the
        name of its source among the different names, and ``conversation``, a number that the rows of tokens of one
        conversation have in common. And what is to be told about each source, bad rows first.

    Raises:
        DataError: If a source cannot be read.
    """
    named = source_names(names)
    find_sources(named, split)  # refuses every wrong name before anything is read
    different = list(dict.fromkeys(named))
    parts: list[Dataset] = []
    reports: list[SourceReport] = []
    left, num_conversations = limit, 0
    for name in named:
        if limit is not None and shares is not None:
            left = math.ceil(shares[name] * limit)
        for source in find_sources(name, split):
            if left == 0:
                break
            tokens = tokenise(source, tokenizer, settings, left, num_proc)
            tokens = _first(_with_origin(tokens, different.index(name), num_conversations), left)
            reports.append(report := SourceReport.of(tokens, source.name))
            parts.append(_good(tokens) if report.bad.count else tokens)
            num_conversations += report.bad.rows
            left = None if left is None else left - report.bad.rows
    return concatenate_datasets(parts), reports


def read_splits(
    sources: Mapping[str, str | list[str] | Mapping[str, float] | None],
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limits: Mapping[str, int | None],
    shares: Shares | None = None,
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
            read[split], found = read_split(
                names, split, tokenizer, settings, limits[split], shares if split == "train" else None, num_proc
            )
            reports += found
    refuse([report.bad for report in reports], on_bad_row)
    return read, reports


def _with_origin(tokens: Dataset, source: int, first_conversation: int) -> Dataset:
    conversations = column(tokens, "record") + first_conversation
    return tokens.add_column("source", numpy.full(len(tokens), source)).add_column("conversation", conversations)


def _first(tokens: Dataset, limit: int | None) -> Dataset:
    """The rows of tokens of the first ``limit`` rows of a source; a document has more than were read."""
    count = len(tokens) if limit is None else int(numpy.searchsorted(column(tokens, "record"), limit))
    return tokens if count == len(tokens) else tokens.select(range(count))


def _good(tokens: Dataset) -> Dataset:
    is_good = tokens.data.column("problem").is_null().to_numpy()[stored_places(tokens)]
    return tokens.select(numpy.flatnonzero(is_good))


def check_columns(reports: Sequence[SourceReport], columns: Mapping[str, str], where: str) -> None:
    """Check that every name that the user maps is in a row of one of the sources; ``where`` names the splits.

    Raises:
        DataError: If one is not. The message names the nearest name that nothing reads.
    """
    if columns and reports:
        renamed = {name for report in reports for name in report.renamed}
        unused = {name for report in reports for name in report.unused}
        check_renamed(columns, renamed, unused, where)
