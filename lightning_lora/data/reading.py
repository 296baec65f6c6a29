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
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import ipc, parquet

from lightning_lora.errors import DataError

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


def read_rows(path: Path) -> Generator[Row, None, None]:
    """Read the rows of a file, in order.

    Args:
        path: A file of one of the kinds of `file_kind`. A ``.txt`` file is one row with the column ``text``.

    Raises:
        DataError: If the file is empty, damaged or not UTF-8, or if a line is not a row.
    """
    read = _READERS[file_kind(path) or ".json"]
    index = -1
    try:
        with _open(path) as stream:
            for index, (line, columns) in enumerate(read(path, stream)):
                yield Row(f"{path}, row {index}" + (f" (line {line})" if line else ""), columns)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        after = f" after row {index}" if index >= 0 else ""
        raise DataError(f"{path} cannot be read{after}: {error}. Is it damaged, or not what its name says?") from error
    if index < 0:
        raise DataError(f"{path} has no rows.")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)  # type: ignore[arg-type]
    return open(path, "rb")


def _json_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[int | None, dict[str, Any]]]:
    lines = ((number, _decoded(path, number, line)) for number, line in enumerate(stream, start=1))
    filled = ((number, text) for number, text in lines if text.strip())
    first, start = next(filled, (1, ""))
    if start.lstrip().startswith("["):
        # The skipped blank lines are restored, so that an error in the list names the right line.
        yield from _listed_rows(path, "\n" * (first - 1) + start + stream.read().decode("utf-8"))
        return
    for number, text in chain([(first, start)] if start else [], filled):
        yield number, _row(f"{path}, line {number}", _parsed(path, number, text))


def _listed_rows(path: Path, text: str) -> Iterator[tuple[None, dict[str, Any]]]:
    for index, value in enumerate(_parsed(path, 1, text)):
        yield None, _row(f"{path}, row {index}", value)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error}); save the file in that encoding.") from error


def _parsed(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise DataError(
            f"{place}: not JSON ({error.msg}). A JSON file holds one object per line, or one list of objects."
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}, line {first_line}: nested too deeply.") from error


def _row(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be an object {{...}}, got {type(value).__name__}: {repr(value)[:80]}.")
    return value


def _tsv_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from _csv_rows(path, stream, "\t")


def _csv_rows(path: Path, stream: BinaryIO, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # Python's 128 KiB is less than one long document
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        for columns in reader:
            if None in columns or None in columns.values():
                between = "commas" if delimiter == "," else "tabs"
                fields = f"the {len(reader.fieldnames or ())} fields of the header"
                place = f"{path}, line {reader.line_num}"
                raise DataError(f"{place}: does not have {fields}; put texts with {between} or line breaks in quotes.")
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
