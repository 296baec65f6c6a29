"""Reading and writing safetensors files: whole, one tensor at a time, or a tensor in blocks.

Nothing here can run code from a file: pickled weights are never opened.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_lora.errors import DamagedFileError, first_five
from lightning_lora.files.atomic import atomic_file
from lightning_lora.files.json_object import parse_json
from lightning_lora.files.safetensors_header import TENSOR_DTYPES, Header, TensorSpan, check_spans, read_header
from lightning_lora.files.scratch import Scratch

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_NAME_OF = {dtype: name for name, dtype in TENSOR_DTYPES.items()}
_LAYOUT_RANK = {name: rank for rank, name in enumerate(reversed(TENSOR_DTYPES))}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory, on the CPU.

    Raises:
        AdapterFileError: If the file is missing, cut or damaged. Nothing else is raised.
    """
    read_header(path)
    try:
        # Not mapped: overwriting the file later would change the tensors, or kill the process that holds them.
        return load_file(path, backend="pread")
    except Exception as error:  # the library raises its own class, OSError, RuntimeError and more
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


class TensorFile:
    """A safetensors file open for reading a few elements at a time.

    The file is read, not mapped. Mapped pages count as memory of the process until the system drops them, and a mapped
    file that is cut short kills the process.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self.header = header

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor ``name``."""
        return TENSOR_DTYPES[self.header.tensors[name].dtype]

    def read(self, name: str, start: int, stop: int, scratch: Scratch | None = None) -> Tensor:
        """Read elements ``start`` to ``stop`` of a tensor, counted row by row, as a tensor of one axis.

        Args:
            scratch: Memory to use; the result is lost at the next call with it. None: fresh memory.

        Raises:
            AdapterFileError: If the file has become shorter since it was opened.
        """
        dtype = self.dtype(name)
        elements = (scratch or Scratch()).empty("read", (stop - start,), dtype)
        self._file.seek(self.header.data_start + self.header.tensors[name].start + start * dtype.itemsize)
        if self._file.readinto(elements.view(torch.uint8).numpy().data) != elements.nbytes:  # pyright: ignore
            raise DamagedFileError(f"{self._file.name} was cut while it was read, within tensor {name!r}.")
        return elements


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open a safetensors file to read it in blocks; it is closed when the context ends.

    Raises:
        AdapterFileError: If the file is missing, cut or damaged.
    """
    header = read_header(path)
    with open(path, "rb") as file:
        yield TensorFile(file, header)


def write_tensors(
    path: str | os.PathLike[str], tensors: Iterable[tuple[str, Tensor]], layout: Layout, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with one tensor in memory at a time; ``path`` is replaced in one step at the end.

    The header comes from ``layout``, so tensors may arrive in any order. Bytes are in the order of the safetensors
    library, by alignment and then by name: equal tensors and metadata give equal files.

    Args:
        tensors: Each name of ``layout`` once, with its tensor, on any device.
        layout: Tensor name to type and shape.
        metadata: Texts to keep in the header; transformers expects ``{"format": "pt"}``.

    Raises:
        ValueError: If a tensor disagrees with ``layout``, comes twice or is missing, or ``layout`` cannot be written.
        OSError: If the disk is full or not writable. After any error the old file is untouched.
    """

    def whole() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name in layout and (tensor.dtype, tuple(tensor.shape)) != (layout[name][0], tuple(layout[name][1])):
                found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{layout[name][0]} {tuple(layout[name][1])}"
                raise ValueError(f"tensor {name!r} is {found}, the layout says {wanted}.")
            yield name, tensor
            del tensor  # otherwise it stays in memory while the iterable makes the next

    write_blocks(path, whole(), layout, metadata)


def write_blocks(
    path: str | os.PathLike[str], blocks: Iterable[tuple[str, Tensor]], layout: Layout, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file as `write_tensors` does, from tensors that come in blocks.

    Args:
        blocks: Pairs of a tensor's name and its next elements, row by row, in any shape and size. Blocks of several
            tensors may alternate. A block is written before the next is asked for.

    Raises:
        ValueError: If a block has another type, a tensor has more or fewer elements than ``layout`` says, or
            ``layout`` cannot be written.
        OSError: If the disk is full or not writable. After any error the old file is untouched.
    """
    spans = _spans(layout)
    header = _header_bytes(spans, metadata)
    waiting = {name: span.end - span.start for name, span in spans.items()}
    with atomic_file(path) as file:
        file.write(header)
        for name, block in blocks:
            if name not in waiting:
                raise ValueError(f"tensor {name!r} {'came twice' if name in spans else 'is not in the layout'}.")
            raw = _raw_bytes(name, block, layout[name][0])
            if len(raw) > waiting[name]:
                raise ValueError(f"tensor {name!r} has more elements than {layout[name][1]}, which the layout says.")
            file.seek(len(header) + spans[name].end - waiting[name])
            file.write(raw)
            waiting[name] -= len(raw)
            if not waiting[name]:
                del waiting[name]
            del block, raw  # otherwise they stay in memory while the iterable makes the next
        if waiting:
            raise ValueError(f"{len(waiting)} of {len(spans)} tensors never came: {first_five(waiting)}.")


def safetensors_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Tensor name to file, for a checkpoint folder in Hugging Face layout, whether one file or shards.

    As in transformers, ``model.safetensors`` is used before an index, and a tensor that the index does not list is not
    part of the model. The header of every file is checked with `read_header`.

    Raises:
        AdapterFileError: If there are no safetensors files, the index is damaged or names a file outside the folder,
            a shard is missing or damaged, or a listed tensor is not where the index says.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(read_header(single).tensors, single)
    if index.exists():
        return _indexed_files(index)
    if pickled := sorted(entry.name for entry in folder.glob("pytorch_model*.bin")):
        raise DamagedFileError(
            f"{folder} holds only pickled weights ({first_five(pickled)}). A pickled file can run code hidden in it, "
            "so none is ever opened here. If you trust it, convert it once with transformers (with the AutoModel "
            f"class of your task): AutoModel.from_pretrained({str(folder)!r}).save_pretrained('converted')."
        )
    raise DamagedFileError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")


def _spans(layout: Layout) -> dict[str, TensorSpan]:
    """The place of each tensor in the file, in file order."""
    if unknown := sorted(name for name, (dtype, _) in layout.items() if dtype not in _NAME_OF):
        raise ValueError(f"safetensors cannot hold {layout[unknown[0]][0]} of tensor {unknown[0]!r}.")
    spans: dict[str, TensorSpan] = {}
    position = 0
    for name in sorted(layout, key=lambda name: (_LAYOUT_RANK[_NAME_OF[layout[name][0]]], name)):
        dtype, shape = layout[name]
        end = position + dtype.itemsize * torch.Size(shape).numel()
        spans[name] = TensorSpan(_NAME_OF[dtype], tuple(shape), position, end)
        position = end
    check_spans(spans)
    return spans


def _header_bytes(spans: Mapping[str, TensorSpan], metadata: Mapping[str, str]) -> bytes:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("metadata must map strings to strings.")
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, (dtype, shape, start, end) in spans.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw_bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor in the format's order, without a copy if memory has this order already."""
    if tensor.dtype != dtype:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}, the layout says {dtype}.")
    if tensor.is_meta or tensor.layout is not torch.strided or sys.byteorder != "little":
        raise ValueError(f"tensor {name!r} has no plain little-endian bytes to write (meta or sparse?).")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        shard_of = parse_json(index.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{index} is damaged: {error}") from error
    if not isinstance(shard_of, dict) or not shard_of:
        raise DamagedFileError(f"{index} has no weight_map from tensor names to files.")
    files = {shard: _shard(index, shard) for shard in set(map(str, shard_of.values()))}
    tensors = {shard: read_header(file).tensors for shard, file in files.items()}
    if lost := [name for name, shard in shard_of.items() if name not in tensors[str(shard)]]:
        raise DamagedFileError(f"{index} lists {len(lost)} tensors their shards do not hold: {first_five(lost)}.")
    return {name: files[shard] for name, shard in shard_of.items()}


def _shard(index: Path, shard: str) -> Path:
    if shard in ("", ".", "..") or any(character in "/\\\0:" for character in shard):
        raise DamagedFileError(f"{index} names {shard[:80]!r}, which is not a plain file name inside its folder.")
    return index.parent / shard
