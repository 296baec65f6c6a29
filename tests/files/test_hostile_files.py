"""Files of strangers: each is read or refused within a second and 200 MB, whatever its bytes say."""

from __future__ import annotations

import json
import random
import re
import textwrap
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.json_object import read_json
from lightning_lora.files.lightning_checkpoint import read_checkpoint
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.files.safetensors_header import TENSOR_DTYPES, read_header
from lightning_lora.files.yaml_text import MAX_CHARACTERS, read_yaml
from tests.files.test_safetensors_header import GOOD, entry, file_of

MB = 10**6
SECONDS, BYTES = 1.0, 200 * MB


def bounded(read: Callable[[], object]) -> str:
    """The message of the error that ``read`` must raise within `SECONDS` of computing and `BYTES` of memory."""
    start = time.process_time()
    with pytest.raises(AdapterFileError) as raised:
        read()
    assert time.process_time() - start < SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError):
            read()
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    return str(raised.value)


LARGE_HEADERS = {
    "B38 a million lists": (b'{"a":[' + b"[]," * MB + b"1]}", "brackets and 1 colons, more than tensors"),
    "B38 a million objects": (b'{"a":[' + b"{}," * MB + b"1]}", "more than tensors"),
    "B38 a million names": (b"{" + b",".join(b'"%x":1' % i for i in range(MB)) + b"}", "colons, more than tensors"),
    "B38 long text": (b'{"a":"' + b"a" * 20 * MB + b'"}', "must have dtype"),
    "B38 long number": (b'{"a":' + b"9" * 20 * MB + b"}", "damaged"),
    "B38 blanks": (b" " * 20 * MB, "cannot be parsed"),
    "B40 dims": (file_of({"a": entry(shape=[1] * 100_000)}, 8)[8:-8], "'a' are not integers in"),
}


@pytest.mark.parametrize("case", LARGE_HEADERS)
def test_a_large_header_is_refused_within_bounds(case: str, tmp_path: Path) -> None:
    header, message = LARGE_HEADERS[case]
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1" * 8)
    assert message in bounded(lambda: read_header(path))


def test_a_header_of_many_tensors_is_read(tmp_path: Path) -> None:
    """What is refused as too dense is denser than the densest header that says something."""
    tensors = {f"{i}": {"dtype": "U8", "shape": [], "data_offsets": [i, i + 1]} for i in range(20_000)}
    path = tmp_path / "many.safetensors"
    text = json.dumps(tensors, separators=(",", ":")).encode()
    assert len(text) > 2**19
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" * len(tensors))
    assert len(read_header(path).tensors) == len(tensors)


def random_header(draw: random.Random) -> bytes:
    """A header that is nearly right: one to three tensors, of which something may be changed, then perhaps one byte."""
    entries: dict[str, object] = {}
    position = 0
    for number in range(draw.randint(1, 3)):
        dtype = draw.choice([*TENSOR_DTYPES])
        shape = [draw.randint(1, 3) for _ in range(draw.randint(0, 2))]
        end = position + int(torch.Size(shape).numel()) * TENSOR_DTYPES[dtype].itemsize
        entries["abc"[number]] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    changes: list[object] = [None, -1, 1 << 63, 1 << 64, 0.5, True, "F32", "", [], [0], {}, "../x", [1, 2, 3], 10**400]
    if draw.random() < 0.4:
        chosen = entries[draw.choice(list(entries))]
        assert isinstance(chosen, dict)
        chosen[draw.choice(["dtype", "shape", "data_offsets", "more"])] = draw.choice(changes)
    if draw.random() < 0.1:
        entries[draw.choice(["__metadata__", "..", "a/b", "\0"])] = draw.choice(changes)
    text = bytearray(json.dumps(entries).encode())
    for _ in range(draw.choice([0, 0, 1, 3])):
        text[draw.randrange(len(text))] = draw.randrange(256)
    length = len(text) + draw.choice([0] * 8 + [-1, 1, 1 << 62])
    return length.to_bytes(8, "little") + bytes(text) + b"\1" * (position + draw.choice([0] * 8 + [-1, 1]))


@pytest.mark.slow
def test_ten_thousand_headers_are_read_as_the_library_does_or_refused(tmp_path: Path) -> None:
    """B40: two thirds are random or cut bytes and changed headers; a fifth is right, so that both outcomes are met."""
    draw = random.Random(0)
    path = tmp_path / "fuzz.safetensors"
    read = refused = 0
    for number in range(10_000):
        kind = number % 10
        if kind == 0:
            path.write_bytes(draw.randbytes(draw.randrange(60)))
        elif kind == 1:
            path.write_bytes(GOOD[: draw.randrange(len(GOOD))] + draw.randbytes(draw.randrange(3)))
        else:
            path.write_bytes(random_header(draw))
        try:
            tensors = read_tensors(path)
        except AdapterFileError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017 - raising is one of two right outcomes
        else:
            read += 1
            expected = load_file(path)
            assert tensors.keys() == expected.keys()
            assert all(tensors[name].dtype == value.dtype for name, value in expected.items())
            assert all(tensors[name].shape == value.shape for name, value in expected.items())
    assert read > 1000
    assert refused > 5000


def test_a_packed_checkpoint_is_refused_by_what_it_says_of_itself(tmp_path: Path) -> None:
    """B55: 300 MB of zeros in 300 kB; torch would unpack them."""
    good, bomb = tmp_path / "good.ckpt", tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(10)}}, good)
    assert read_checkpoint(good)["state_dict"]["a"].shape == (10,)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            content = source.read(part)
            target.writestr(part.filename, bytes(300 * MB) if part.filename.endswith("data/0") else content)
    assert bomb.stat().st_size < MB
    assert "is compressed" in bounded(lambda: read_checkpoint(bomb))


def test_json_beside_an_adapter_is_refused_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    for content in (b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"[1]", b'{"a": NaN' * 1000):
        path.write_bytes(content)
        assert str(path) in bounded(lambda: read_json(path))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
YAML = {
    "B66 an alias bomb": (BOMB, "values with its aliases written out, more than 100000"),
    "B66 an alias in itself": ("a: &a [*a]", "line 1 has an alias inside of what it stands for"),
    "B66 a Python object": ("a: 1\nb: !!python/object/apply:os.system ['touch sentinel']", "line 2 has the tag"),
    "B66 a Python name": ("a: !!python/name:os.system", "line 1 has the tag"),
    "B66 a long text": ("a: " + "x" * MAX_CHARACTERS, "more than the 1048576 that settings need"),
    "B65 nested brackets": ("a: " + "[" * 5000, "nested too deeply"),
    "B65 nested groups": ("\n".join(f"{' ' * i}a:" for i in range(1200)), "nested too deeply"),
    "B62 a key twice": ("a: {b: 1, c: 2,\n b: 3}", "'b' is given twice in one group, in lines 1 and 2"),
    "B62 a key twice in a line": ("a: {b: 1, b: 3}", "'b' is given twice in one group, in lines 1 and 1"),
    "B64 octal": ("a: 1\nb: 010", "line 2: 010 is octal to YAML"),
    "B64 sixties": ("a: 1:30", "line 1: 1:30 counts in sixties to YAML"),
    "B64 no such day": ("a: 2026-02-30", "day is out of range"),
}


@pytest.mark.parametrize("case", YAML)
def test_bad_yaml_is_refused_within_bounds(case: str) -> None:
    text, message = YAML[case]
    start = time.process_time()
    with pytest.raises(yaml.YAMLError, match=re.escape(message)):
        read_yaml(text)
    assert time.process_time() - start < SECONDS


def test_good_yaml_is_read_as_the_library_reads_it() -> None:
    text = textwrap.dedent("""\
        \ufefflow: &low {rank: 1, on: yes}
        high: {<<: *low, rank: 16}
        numbers: [0, -1, 1_000, 0x1F, 1e-4, 1.5, .inf]
        texts: ['010', "1:30", 2026-11-27, ~]
        """)
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None
