"""Rows of one file, exactly as written.

The readers are Python's own rather than those of ``datasets``: pyarrow's JSON reader converts texts that look like
dates to timestamps and mixed columns to other types, and pandas converts ``NA`` to a missing value. Here every text
stays as it is, and an error names the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import ipc, parquet

from lightning_lora.data.bad_rows import RowError
from lightning_lora.errors import DataFileError, first_five

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
COMPRESSED_INSIDE = (".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    """One row of a file or hub dataset, and its origin.

    Args:
        place: File and row, for messages. Rows are counted from 0, lines from 1.
        columns: Value of each column, by name.
    """

    place: str
    columns: dict[str, Any]


def file_kind(path: Path) -> str | None:
    """The suffix that tells how to read a file, without ``.gz`` or ``.zst``; None for a file of an unknown kind."""
    zipped = path.suffix.lower() in COMPRESSIONS
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    return suffix if suffix in SUFFIXES and not (zipped and suffix in COMPRESSED_INSIDE) else None


def read_rows(path: Path) -> Generator[Row | RowError, None, None]:
    """Read the rows of a file, in order.

    Args:
        path: A file of one of the kinds of `file_kind`. A ``.txt`` file is one row with the column ``text``.

    Yields:
        A row, or what is wrong with one that cannot be read while those after it can.

    Raises:
        DataError: If the file is empty, or damaged so that it cannot be read on.
    """
    read = _READERS[file_kind(path) or ".json"]
    index = -1
    try:
        with _open(path) as stream:
            for index, (line, columns) in enumerate(read(path, stream)):
                if isinstance(columns, RowError):
                    yield columns
                    continue
                yield Row(f"{path}, row {index}" + (f" (line {line})" if line else ""), columns)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        after = f" after row {index}" if index >= 0 else ""
        raise DataFileError(
            f"{path} cannot be read{after}: {str(error).rstrip('.')}. Is it damaged, or not what its name says?"
        ) from error
    if index < 0:
        raise DataFileError(f"{path} has no rows.")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)  # type: ignore[arg-type]
    return open(path, "rb")


def _json_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[int | None, dict[str, Any] | RowError]]:
    lines = ((number, _decoded(path, number, line)) for number, line in enumerate(stream, start=1))
    filled = ((number, text) for number, text in lines if isinstance(text, RowError) or text.strip())
    first, start = next(filled, (1, ""))
    if isinstance(start, str) and start.lstrip().startswith("["):
        # The skipped blank lines are restored, so that an error in the list names the right line.
        yield from _listed_rows(path, "\n" * (first - 1) + start + stream.read().decode("utf-8"))
        return
    for number, text in chain([(first, start)] if start else [], filled):
        value = text if isinstance(text, RowError) else _parsed(path, number, text.rstrip())
        yield number, _row(f"{path}, line {number}", value)


def _listed_rows(path: Path, text: str) -> Iterator[tuple[None, dict[str, Any] | RowError]]:
    values = _parsed(path, 1, text)
    if isinstance(values, RowError):
        raise values  # not one row of the list can be read
    for index, value in enumerate(values):
        yield None, _row(f"{path}, row {index}", value)


def _decoded(path: Path, number: int, line: bytes) -> str | RowError:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"{path}, line {number}", "not UTF-8", f" ({error}); save the file in that encoding.")


def _parsed(path: Path, first_line: int, text: str) -> Any:
    """The value of a text, or what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        advice = "A JSON file holds one object per line, or one list of objects."
        return RowError(place, "not JSON", f" ({error.msg}). {advice}")
    except ValueError as error:  # a number with thousands of digits
        return RowError(f"{path}, line {first_line}", "a number that cannot be read", f" ({error}).")
    except RecursionError:
        return RowError(f"{path}, line {first_line}", "nested too deeply", ".")


def _row(place: str, value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, (dict, RowError)):
        return value
    return RowError(place, "a row must be an object {...}", f", got {type(value).__name__}: {repr(value)[:80]}.")


def _tsv_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    yield from _csv_rows(path, stream, "\t")


def _csv_rows(path: Path, stream: BinaryIO, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    csv.field_size_limit(sys.maxsize)  # Python's 128 KiB is less than one long document
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        if twice := [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1]:
            raise DataFileError(f"{path}: the header names {first_five(map(repr, twice))} more than once: rename one.")
        for columns in reader:
            if None in columns or None in columns.values():
                fault = f"does not have the {len(reader.fieldnames or ())} fields of the header"
                advice = f"; put texts with {'commas' if delimiter == ',' else 'tabs'} or line breaks in quotes."
                yield reader.line_num, RowError(f"{path}, line {reader.line_num}", fault, advice)
                continue
            yield reader.line_num, columns


def _parquet_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[None, dict[str, Any]]]:
    for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1000):
        for columns in batch.to_pylist():
            yield None, columns


def _arrow_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[None, dict[str, Any]]]:
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        file = ipc.open_file(stream)
        batches = map(file.get_batch, range(file.num_record_batches))
    else:
        batches = ipc.open_stream(stream)
    for batch in batches:
        for columns in batch.to_pylist():
            yield None, columns


def _text_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[None, dict[str, Any]]]:
    text = stream.read().decode("utf-8-sig")
    if text.strip():
        yield None, {"text": text}


_READERS = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".txt": _text_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
