"""What we write is what the safetensors library writes and reads, whole or in blocks."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.safetensors_file import (
    open_tensors,
    read_tensors,
    write_blocks,
    write_tensors,
)
from lightning_lora.files.safetensors_header import TENSOR_DTYPES

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(4096)}, path)
    tensors = read_tensors(path)
    path.write_bytes(b"")
    assert torch.equal(tensors["a"], torch.arange(4096))


@pytest.mark.parametrize("dtype", TENSOR_DTYPES.values(), ids=str)
def test_every_dtype_survives_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": random_tensor(dtype, (3, 5)),
        "scalar": random_tensor(dtype, ()),
        "x.y-z é": random_tensor(dtype, (1,)),
    }
    write_tensors(tmp_path / "ours", tensors.items(), layout_of(tensors), {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for loaded in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert loaded.keys() == tensors.keys()
        assert all(same_bytes(loaded[name], tensors[name]) for name in tensors)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0."), max_size=8),
        st.tuples(st.sampled_from(list(TENSOR_DTYPES.values())), st.lists(st.integers(1, 4), max_size=3).map(tuple)),
        min_size=1,
        max_size=8,
    ),
    order=st.randoms(),
)
def test_written_file_equals_the_librarys_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, order: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    tensors = {name: random_tensor(dtype, shape) for name, (dtype, shape) in layout.items()}
    arrivals = list(tensors.items())
    order.shuffle(arrivals)
    write_tensors(folder / "ours", arrivals, layout, {"a": 'é"\n\u2028'})
    save_file(tensors, folder / "theirs", {"a": 'é"\n\u2028'})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert all(same_bytes(loaded, tensors[name]) for name, loaded in read_tensors(folder / "ours").items())


def test_views_and_parameters_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "expanded": base[:1].expand(3, 4),
        "strided": base[:, ::2],
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    write_tensors(tmp_path / "a", tensors.items(), layout_of(tensors), {})
    loaded = load_file(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name in "abcd":
            gc.collect()
            tensor = torch.ones(3)
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    write_tensors(tmp_path / "a", stream(), dict.fromkeys("abcd", (torch.float32, (3,))), {})
    assert most == 1


A, B = torch.ones(2), torch.zeros(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", A)], "1 of 2 tensors never came: b"),
        ([("a", A), ("b", B), ("c", A)], "tensor 'c' is not in the layout"),
        ([("a", A), ("a", A)], "tensor 'a' came twice"),
        ([("a", A), ("b", B.float())], r"tensor 'b' is torch.float32 \(3,\), the layout says torch.bfloat16 \(3,\)"),
        ([("a", A), ("b", B[:2])], r"tensor 'b' is torch.bfloat16 \(2,\), the layout says torch.bfloat16 \(3,\)"),
        ([("a", A.to("meta"))], "no plain little-endian bytes"),
        ([("a", A.to_sparse())], "no plain little-endian bytes"),
    ],
    ids=["missing", "unknown", "twice", "dtype", "shape", "meta", "sparse"],
)
def test_disagreement_with_the_layout_leaves_the_old_file(
    tensors: list[tuple[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_tensors(path, tensors, layout_of({"a": A, "b": B}), {})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_blocks_make_the_same_file_as_whole_tensors_and_are_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(11).bfloat16(), "c": torch.arange(9).reshape(3, 3)}
    layout = layout_of(tensors)
    write_tensors(tmp_path / "whole", tensors.items(), layout, {"format": "pt"})
    pieces = {name: tensor.reshape(-1).split(4) for name, tensor in tensors.items()}
    # Of one tensor in order, of several as they come.
    blocks = [(name, pieces[name][i]) for i in range(9) for name in "cab" if i < len(pieces[name])]
    write_blocks(tmp_path / "blocks", blocks, layout, {"format": "pt"})
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()
    with open_tensors(tmp_path / "blocks") as file:
        for name, tensor in tensors.items():
            assert file.dtype(name) == tensor.dtype
            size = tensor.numel()
            parts = [file.read(name, start, min(start + 4, size)) for start in range(0, size, 4)]
            assert torch.equal(torch.cat(parts).reshape(tensor.shape), tensor)


def test_blocks_too_many_or_too_few_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    layout = layout_of({"a": A})
    with pytest.raises(ValueError, match=r"tensor 'a' has more elements than \(2,\)"):
        write_blocks(path, [("a", A[:1]), ("a", A)], layout, {})
    with pytest.raises(ValueError, match="1 of 1 tensors never came: a"):
        write_blocks(path, [("a", A[:1])], layout, {})
    assert path.read_bytes() == b"old"


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"a": torch.ones(100_000)}, path)
    with open_tensors(path) as file:
        os.truncate(path, 200_000)
        with pytest.raises(AdapterFileError, match="a was cut while it was read, within tensor 'a'"):
            file.read("a", 0, 100_000)


@pytest.mark.parametrize(
    ("layout", "metadata", "message"),
    [
        ({}, {}, "holds no tensors"),
        ({"a": (torch.complex128, (1,))}, {}, "cannot hold torch.complex128 of tensor 'a'"),
        ({"a": (torch.float32, (0,))}, {}, "'a' is empty"),
        ({"../a": (torch.float32, (1,))}, {}, "tensor name '../a'"),
        ({"__metadata__": (torch.float32, (1,))}, {}, "no tensor can be named"),
        ({"a": (torch.float32, (1,))}, {"step": 3}, "metadata must map strings to strings"),
    ],
)
def test_layout_we_would_not_read_is_not_written(layout: Layout, metadata: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "a", [], layout, metadata)
    assert not list(tmp_path.iterdir())
