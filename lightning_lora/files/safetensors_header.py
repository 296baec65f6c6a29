"""The header of a safetensors file, checked before anything else reads the file.

The library accepts duplicate names, ``../../x`` as a name and unknown fields, and its messages do not name the file.
Here the whole header is checked first, and every error says which file and what is wrong.

Format: the length of the header, 8 bytes, little endian; the header, a JSON object; then the tensors without gaps.
Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import torch

from lightning_lora.errors import AdapterFileError, DamagedFileError
from lightning_lora.files.json_object import parse_json

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_NAME_LENGTH = 1_000
MAX_NUM_DIMS = 64
_LARGE_HEADER = 2**19

# Ordered by alignment, then as in the library. Files hold the tensors in the reverse of this order.
TENSOR_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


class TensorSpan(NamedTuple):
    """Type and shape of a tensor, and the place of its bytes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: Tensor name to its type in the format's words (``"BF16"``), shape, first byte, and byte after the last.
        metadata: Texts that the writer added, often ``{"format": "pt"}``.
        data_start: Position in the file of the first tensor byte, in bytes.
        size: Size of the whole file, in bytes.
    """

    tensors: Mapping[str, TensorSpan]
    metadata: Mapping[str, str]
    data_start: int
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file, and that the file is as long as the header says.

    Raises:
        AdapterFileError: If the file is missing, cut, damaged, or not a safetensors file. Nothing else is raised.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DamagedFileError(f"{path} is not a regular file.")
        with open(path, "rb") as file:
            return _checked_header(path, file)
    except AdapterFileError:
        raise
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} does not exist.") from error
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def check_spans(tensors: Mapping[str, TensorSpan]) -> int:
    """Check names, types, shapes and offsets against each other; return the number of data bytes.

    Raises:
        ValueError: If they contradict each other, or a name could escape a folder.
    """
    if not tensors:
        raise ValueError("it holds no tensors.")
    position = 0
    for name, span in sorted(tensors.items(), key=lambda item: item[1].start):
        _check_name(name)
        _check_span(name, span)
        if span.start != position:
            what = "a hole before" if span.start > position else "an overlap at"
            raise ValueError(f"there is {what} tensor {name!r}: it starts at {span.start}, expected {position}.")
        position = span.end
    return position


def _checked_header(path: str | os.PathLike[str], file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise DamagedFileError(f"{path} is incomplete: expected at least 8 bytes, found {size}")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise DamagedFileError(
            f"{path} is not a safetensors file: its header would be {length} bytes long, more than "
            f"{MAX_HEADER_BYTES}. A pickled file, a web page or a Git LFS pointer under this name looks like this."
        )
    data_start = 8 + length
    if size < data_start:
        raise DamagedFileError(f"{path} is incomplete: expected at least {data_start} bytes, found {size}")
    text = file.read(length)
    _check_density(text)
    entries = parse_json(text)
    metadata = _parse_metadata(entries.pop("__metadata__", {}))
    tensors = {name: _parse_span(name, entry) for name, entry in entries.items()}
    expected = data_start + check_spans(tensors)
    if size != expected:
        state = "incomplete" if size < expected else "too long"
        raise DamagedFileError(f"{path} is {state}: expected {expected} bytes, found {size}")
    return Header(tensors, metadata, data_start, size)


def _check_density(text: bytes) -> None:
    """Refuse megabytes of tiny values, which take seconds and thirty times their size once they are parsed."""
    opened, named = text.count(b"[") + text.count(b"{"), text.count(b":")
    # The entry of a tensor has 3 of the one and 4 of the other in at least 50 bytes.
    if len(text) > _LARGE_HEADER and max(12 * opened, 10 * named) > len(text):
        raise ValueError(
            f"its header of {len(text)} bytes has {opened} brackets and {named} colons, more than tensors."
        )


def _parse_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not an object of strings.")
    return metadata


def _parse_span(name: str, entry: object) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!r} must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_NUM_DIMS:
        raise ValueError(f"the shape or the offsets of tensor {name[:80]!r} are not integers in [0, 2^63).")
    return TensorSpan(dtype, tuple(shape), *offsets)


def _are_sizes(values: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"a tensor name is {len(name)} characters long, the limit is {MAX_NAME_LENGTH}: {name[:80]!r}")
    if name == "__metadata__":
        raise ValueError("no tensor can be named '__metadata__', the format keeps that name for itself.")
    if ".." in name or any(character in "/\\\0" or "\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"tensor name {name[:80]!r} has a '..', a slash or a character no parameter name has.")


def _check_span(name: str, span: TensorSpan) -> None:
    if not isinstance(span.dtype, str) or span.dtype not in TENSOR_DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {str(span.dtype)[:80]!r}; known are {', '.join(TENSOR_DTYPES)}.")
    if 0 in span.shape:
        raise ValueError(f"tensor {name!r} is empty, shape {span.shape}; was it saved from sharded parameters?")
    expected = math.prod(span.shape) * TENSOR_DTYPES[span.dtype].itemsize
    if span.end - span.start != expected:
        found = span.end - span.start
        raise ValueError(
            f"tensor {name!r}, {span.dtype} {span.shape}, needs {expected} bytes, its offsets span {found}."
        )
