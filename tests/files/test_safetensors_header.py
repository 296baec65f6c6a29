"""Damaged and hostile safetensors files are refused by name, at once and in little memory."""

from __future__ import annotations

import json
import os
import re
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.files.safetensors_header import TENSOR_DTYPES, Header, TensorSpan, read_header
from tests.support import toys


def file_of(header: object, num_data_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\1" * num_data_bytes


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


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
        start = time.process_time()
        with pytest.raises(AdapterFileError, match=f"{re.escape(str(path))} .*{message}") as raised:
            read(path)
        assert time.process_time() - start < 1
        assert len(str(raised.value)) < 1000
        str(raised.value).encode()


def test_bad_files_need_little_memory(tmp_path: Path) -> None:
    for number, (content, _) in enumerate(BAD_FILES.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    script = """
        import resource, sys
        from pathlib import Path
        from lightning_lora.errors import AdapterFileError
        from lightning_lora.files.safetensors_header import read_header
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in Path(sys.argv[1]).iterdir():
            try:
                read_header(path)
            except AdapterFileError:
                continue
            sys.exit(f"{path} was accepted")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = toys.run_python(textwrap.dedent(script), tmp_path)
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
