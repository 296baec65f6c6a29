"""Damaged and hostile safetensors files are refused by name; what we write is what the library writes and reads."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import textwrap
import time
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
    Header,
    TensorSpan,
    open_tensors,
    read_header,
    read_tensors,
    safetensors_files,
    write_blocks,
    write_tensors,
)
from lightning_lora.files.safetensors_header import TENSOR_DTYPES

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def file_of(header: object, num_data_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\1" * num_data_bytes


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


GOOD = file_of({"a": entry(), "b": entry("BF16", (3,), (8, 14))}, 14)
HEADER_END = len(GOOD) - 14

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "B35 zero bytes": (b"", "is incomplete: expected at least 8 bytes, found 0"),
    "B36 cut at 4": (GOOD[:4], "is incomplete: expected at least 8 bytes, found 4"),
    "B36 cut at 20": (GOOD[:20], f"is incomplete: expected at least {HEADER_END} bytes, found 20"),
    "B36 cut in half": (GOOD[: len(GOOD) // 2], f"is incomplete: expected at least {HEADER_END} bytes"),
    "B36 no data": (GOOD[:-14], f"is incomplete: expected {len(GOOD)} bytes, found {HEADER_END}"),
    "B36 last byte": (GOOD[:-1], f"is incomplete: expected {len(GOOD)} bytes, found {len(GOOD) - 1}"),
    "B37 length 2^63": (
        file_of({}, length=1 << 63),
        "is not a safetensors file: its header would be 9223372036854775808",
    ),
    "B37 length 0": (file_of(b"") + b"{}", "JSON cannot be parsed"),
    "B37 beyond the file": (file_of({}, length=1000), "is incomplete: expected at least 1008 bytes, found 10"),
    "B37 a pickle": (b"PK\3\4" + b"\0\0\x08\x08" * 20, "is not a safetensors file.*pickled"),
    "B38 not UTF-8": (file_of(b'{"\xff": 1}'), "not UTF-8"),
    "B38 UTF-16": (file_of('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "B38 not JSON": (file_of(b"{'a': 1}"), "cannot be parsed"),
    "B38 a list": (file_of([1]), "is a list, not an object"),
    "B38 nested lists": (file_of(b"[" * 100_000), "nested too deeply"),
    "B38 nested objects": (file_of(b'{"a":' * 100_000), "nested too deeply"),
    "B38 huge integer": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "damaged"),
    "B39 overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "an overlap at tensor 'b'"),
    "B39 same bytes twice": (file_of({"a": entry(), "b": entry()}, 8), "an overlap at tensor 'b'"),
    "B39 hole": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "a hole before tensor 'b'"),
    "B39 hole at the start": (file_of({"a": entry(offsets=(4, 12))}, 12), "a hole before tensor 'a'.*at 4, expected 0"),
    "B39 trailing bytes": (GOOD + b"x", f"is too long: expected {len(GOOD)} bytes, found {len(GOOD) + 1}"),
    "B40 negative offset": (file_of({"a": entry(offsets=(-8, 0))}, 8), "'a' are not integers in"),
    "B40 reversed offsets": (file_of({"a": entry(offsets=(8, 0))}, 8), "needs 8 bytes, its offsets span -8"),
    "B40 negative dim": (file_of({"a": entry(shape=(-1, -2))}, 8), "'a' are not integers in"),
    "B40 dim is true": (file_of({"a": entry(shape=(True, 2))}, 8), "'a' are not integers in"),
    "B40 dim is a float": (file_of({"a": entry(shape=(2.0,))}, 8), "'a' are not integers in"),
    "B40 dim is a text": (file_of({"a": entry(shape="2")}, 8), "'a' are not integers in"),
    "B40 three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, 8), "'a' are not integers in"),
    "B40 size overflow": (file_of({"a": entry(shape=(1 << 62, 4, 2))}, 8), "its offsets span 8"),
    "B40 dim over 2^63": (file_of({"a": entry(shape=(1 << 64,))}, 8), "'a' are not integers in"),
    "B40 too many dims": (file_of({"a": entry(shape=[1 << 60] * 100_000)}, 8), "'a' are not integers in"),
    "B40 wrong size": (file_of({"a": entry("F64")}, 8), "'a', F64 \\(2,\\), needs 16 bytes, its offsets span 8"),
    "B40 unknown dtype": (file_of({"a": entry("F31")}, 8), "dtype 'F31'; known are BOOL"),
    "B40 dtype is a list": (file_of({"a": entry(["F32"])}, 8), "dtype"),
    "B41 empty object": (file_of({}), "holds no tensors"),
    "B41 only metadata": (file_of({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "B42 duplicate name": (file_of(b'{"a": 1, "a": 2}'), "the key 'a' twice"),
    "B42 duplicate field": (file_of(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "the key 'dtype' twice"),
    "B43 name climbs out": (file_of({"../../x": entry()}, 8), r"tensor name '../../x' has a '..'"),
    "B43 name with two dots": (file_of({"a..x": entry()}, 8), "tensor name 'a..x'"),
    "B43 name with a slash": (file_of({"a/x": entry()}, 8), "tensor name 'a/x'"),
    "B43 name with NUL": (file_of({"a\0x": entry()}, 8), "tensor name 'a"),
    "B43 half a surrogate": (file_of({"a\ud800": entry()}, 8), "tensor name 'a"),
    "B43 name of 1 MB": (file_of({"a" * 1_000_000: entry()}, 8), "is 1000000 characters long, the limit is 1000"),
    "B45 empty tensor": (file_of({"a": entry(shape=(0, 4), offsets=(0, 0))}), "'a' is empty, shape \\(0, 4\\)"),
    "unknown field": (file_of({"a": entry(strides=(1,))}, 8), "'a' must have dtype, shape and data_offsets"),
    "missing field": (file_of({"a": {"dtype": "F32", "shape": (2,)}}, 8), "'a' must have"),
    "entry is a number": (file_of({"a": 5}, 8), "'a' must have"),
    "metadata is a list": (file_of({"__metadata__": [], "a": entry()}, 8), "__metadata__ is not"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": entry()}, 8), "__metadata__ is not"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name_and_at_once(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_tensors):
        start = time.perf_counter()
        with pytest.raises(AdapterFileError, match=f"{re.escape(str(path))} .*{message}") as raised:
            read(path)
        assert time.perf_counter() - start < 1
        assert len(str(raised.value)) < 1000
        str(raised.value).encode()


def test_bad_files_need_little_memory(tmp_path: Path) -> None:
    for number, (content, _) in enumerate(BAD_FILES.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    script = """
        import resource, sys
        from pathlib import Path
        from lightning_lora.errors import AdapterFileError
        from lightning_lora.files.safetensors_file import read_header
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in Path(sys.argv[1]).iterdir():
            try:
                read_header(path)
            except AdapterFileError:
                continue
            sys.exit(f"{path} was accepted")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_things_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / ("a" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            read_tensors(path)


names = st.text(max_size=6) | st.sampled_from(["a", "b", "__metadata__", "..", "x" * 1001])
numbers = st.integers(-2, 70) | st.integers() | st.sampled_from([0, 4, 8, 1 << 63]) | st.booleans() | st.floats()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*TENSOR_DTYPES, "F4", "", None]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | st.just([0, 8]),
    },
    optional={"more": st.none()},
)
anything = st.recursive(
    st.none() | numbers | st.text(max_size=4),
    lambda inner: st.lists(inner) | st.dictionaries(names, inner),
    max_leaves=6,
)
headers = st.dictionaries(names, entries | anything, max_size=4).map(lambda header: json.dumps(header).encode())


@settings(max_examples=400, deadline=None)
@given(
    header=headers | st.binary(max_size=60),
    data=st.binary(max_size=40),
    length_error=st.sampled_from([0] * 8 + [-1, 1]),
)
def test_random_headers_raise_our_error_or_load(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, length_error: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(file_of(header, length=max(0, len(header) + length_error)) + data)
    try:
        tensors = read_tensors(path)
    except AdapterFileError as error:
        assert str(path) in str(error)  # noqa: PT017 - raising is one of two right outcomes
    else:
        assert tensors.keys() == load_file(path).keys()


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, HEADER_END - 1), byte=st.integers(0, 255))
def test_one_changed_header_byte_raises_our_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
    try:
        assert len(read_tensors(path)) == 2
    except AdapterFileError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_header_says_what_is_where(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    spans = {"a": TensorSpan("F32", (2,), 0, 8), "b": TensorSpan("BF16", (3,), 8, 14)}
    assert read_header(path) == Header(spans, {}, HEADER_END, len(GOOD))


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


def save_shards(folder: Path, weight_map: object) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"c": torch.ones(2)}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_checkpoint_of_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert safetensors_files(tmp_path) == {"a": tmp_path / "model.safetensors"}


def test_checkpoint_of_shards(tmp_path: Path) -> None:
    first, second = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_shards(tmp_path, {"a": first.name, "b": first.name, "c": second.name})
    assert safetensors_files(tmp_path) == {"a": first, "b": first, "c": second}
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"model-2\.safetensors is incomplete"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model-1.safetensors"}, "'../model-1.safetensors', which is not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors does not exist"),
        ({"a": 5}, "5 does not exist"),
        ({"a": "model-2.safetensors"}, "lists 1 tensors their shards do not hold: a"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_index_that_lies_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    save_shards(tmp_path, weight_map)
    with pytest.raises(AdapterFileError, match=message):
        safetensors_files(tmp_path)


def test_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"index.json is damaged: its JSON cannot be parsed"):
        safetensors_files(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"has neither model\.safetensors nor"):
        safetensors_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(
        AdapterFileError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained\('converted'\)"
    ):
        safetensors_files(tmp_path)
