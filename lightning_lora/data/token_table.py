"""Tables of tokens: what a batch of rows becomes, and all that is told about the rows at the start of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy
import pyarrow
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.documents import divide_document
from lightning_lora.data.encoding import Encoded, encode
from lightning_lora.data.formats.find import Format, find_format
from lightning_lora.data.formats.pairs import PairFormat, find_pair_format
from lightning_lora.data.preferences.encode_pairs import encode_pairs
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Pair, Text
from lightning_lora.data.settings import RowSettings

COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "supervised": List(Value("bool")),
        "length": Value("int32"),
        "supervised_tokens": Value("int32"),
        "largest_id": Value("int32"),
        "open_ended": Value("bool"),
        "weight": Value("float32"),
        "margin": Value("float32"),
        "place": Value("string"),
        "record": Value("int64"),
        "problem": Value("string"),
        "detail": Value("string"),
        "renamed": List(Value("string")),
        "unused": List(Value("string")),
        "notes": List(Value("string")),
    }
)
"""Columns of a row of tokens: ids and mask after cutting, number of tokens before cutting, number of supervised tokens
after it, the largest id, whether the conversation ends with a turn that is not the assistant's, factor of the loss, by
how much the row's answer is preferred in a pair (0 if the pair does not say), the origin, the number of the
conversation or text within its source, and what is told about the row. A row that cannot be
used has no tokens; ``problem`` and ``detail`` say what is wrong with it."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source.

    Args:
        start: Number of the first of them within the source.
        rows: The rows, or what is wrong with those that cannot be read.
    """

    start: int
    rows: list[Row | RowError]


@dataclass(frozen=True)
class ToTokens:
    """Converts chunks of rows to tables of tokens; it can be sent to other processes.

    Args:
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        example: A row of the source whose columns decide the format of all of its rows.
        are_documents: Whether each row is a text that fills as many rows of tokens as it needs; each of these then
            counts like a row of its own.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: RowSettings
    example: Row
    are_documents: bool = False

    def __call__(self, chunk: Chunk) -> pyarrow.Table:
        """A table with the columns of `COLUMNS`: one or several rows for each row of the chunk, in order."""
        read = _find_format(self.example, self.settings).read
        records = [row if isinstance(row, RowError) else _or_error(read, row) for row in chunk.rows]
        good = [record for record in records if not isinstance(record, RowError)]
        encode_all = encode_pairs if self.settings.pairs else encode
        encoded: Iterator[Any] = iter(encode_all(self.tokenizer, good, self.settings) if good else ())
        lines: list[_Line] = []
        for number, record in enumerate(records, start=chunk.start):
            result = record if isinstance(record, RowError) else next(encoded)
            if isinstance(result, RowError):
                lines.append(_Line(number, result, _NOTHING, result))
            elif isinstance(record, Pair):
                margin = record.margin or 0.0
                lines += [_Line(number, side, row, margin=margin) for side, row in result]
            elif self.are_documents:
                assert not isinstance(record, RowError)
                parts = divide_document(record, result, self.settings.max_length)
                lines += [_Line(part, *divided) for part, divided in enumerate(parts, start=number)]
            else:
                lines += [_Line(number, record, row) for row in result]
        return _table(lines, self.settings.max_length)


def find_example(rows: Sequence[Row | RowError], settings: RowSettings) -> Row | list[RowError]:
    """The first row that is of a known format; if there is none, what is wrong with each row."""
    errors: list[RowError] = []
    for row in rows:
        found = row if isinstance(row, RowError) else _or_error(partial(_find_format, settings=settings), row)
        if not isinstance(found, RowError):
            assert isinstance(row, Row)
            return row
        errors.append(found)
    return errors


class _Line(NamedTuple):
    number: int
    record: Conversation | Text | RowError
    row: Encoded
    problem: RowError | None = None
    margin: float = 0.0


_NOTHING = Encoded(numpy.zeros(0, dtype=numpy.int64), numpy.zeros(0, dtype=bool))


def _find_format(row: Row, settings: RowSettings) -> Format | PairFormat:
    return find_pair_format(row, settings) if settings.pairs else find_format(row, settings)


def _or_error(read: Callable[[Row], Any], row: Row) -> Any:
    try:
        return read(row)
    except RowError as error:
        return error


def _table(lines: list[_Line], max_length: int) -> pyarrow.Table:
    lengths = numpy.array([len(line.row.ids) for line in lines], dtype=numpy.int64)
    kept = numpy.minimum(lengths, max_length)
    ends = numpy.cumsum(kept)
    ids = numpy.concatenate([line.row.ids[:max_length] for line in lines]).astype(numpy.int32)
    supervised = numpy.concatenate([line.row.supervised[:max_length] for line in lines])
    trained = numpy.concatenate([[0], numpy.cumsum(supervised)])
    offsets = pyarrow.array(numpy.concatenate([[0], ends]), pyarrow.int32())
    columns = {
        "input_ids": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(ids)),
        "supervised": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(supervised)),
        "length": lengths,
        "supervised_tokens": trained[ends] - trained[ends - kept],
        "largest_id": [int(line.row.ids[:max_length].max(initial=-1)) for line in lines],
        "open_ended": _open_ended(lines),
        "weight": [getattr(line.record, "weight", 1.0) for line in lines],
        "margin": [line.margin for line in lines],
        "place": [line.record.place for line in lines],
        "record": [line.number for line in lines],
        "problem": [line.problem and line.problem.kind for line in lines],
        "detail": [line.problem and line.problem.detail for line in lines],
        "renamed": [sorted(getattr(line.record, "renamed", ())) for line in lines],
        "unused": [sorted(line.row.unused | getattr(line.record, "unused", frozenset())) for line in lines],
        "notes": [sorted(line.row.notes) for line in lines],
    }
    return pyarrow.table(list(columns.values()), schema=COLUMNS.arrow_schema)


def _open_ended(lines: list[_Line]) -> list[bool]:
    """Whether each row holds the end of a conversation that ends with a turn that is not the assistant's."""
    last = [line.number != after.number for line, after in pairwise(lines)] + [True]
    return [
        is_last and isinstance(line.record, Conversation) and line.record.messages[-1]["role"] != "assistant"
        for line, is_last in zip(lines, last, strict=True)
    ]
