"""Tables with tabs, plain texts, Arrow, and compressed files are read as what they are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from pyarrow import ipc
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import DataError
from tests.data.conftest import Write

TABLE = {"question": ["Hello", "with a\ttab", "with\na line break"], "answer": ["five", 'a "quote"', "1,5"]}
TSV = 'question\tanswer\nHello\tfive\n"with a\ttab"\t"a ""quote"""\n"with\na line break"\t1,5\n'
JSONL = '{"question": "Hello", "answer": "five"}\n{"question": "with a\\ttab", "answer": "a \\"quote\\""}\n'
JSONL += '{"question": "with\\na line break", "answer": "1,5"}\n'
CSV = 'question,answer\nHello,five\nwith a\ttab,"a ""quote"""\n"with\na line break","1,5"\n'


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(file: bool, **options: Any) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.table(TABLE)
    with (ipc.new_file if file else ipc.new_stream)(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def tokens(path: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
    data = SFTDataModule(path, tokenizer=tokenizer, **options)
    data.setup()
    return list(data.rows["train"]["input_ids"])


KINDS: dict[str, bytes] = {
    "a.tsv": TSV.encode(),
    "a.TSV": b"\xef\xbb\xbf" + TSV.encode(),
    "a.tsv.gz.": gzip.compress(TSV.encode()),
    "a.tsv.zst": zstd(TSV.encode()),
    "a.csv.zst": zstd(CSV.encode()),
    "a.jsonl.zst": zstd(JSONL.encode()),
    "a.json.zst": zstd(JSONL.encode()),
    "two frames.jsonl.zst": zstd(JSONL[:50].encode()) + zstd(JSONL[50:].encode()),
    "stream.arrow": arrow(False),
    "file.arrow": arrow(True),
    "small.arrow": arrow(True, options=ipc.IpcWriteOptions(compression="zstd")),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(write: Write, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    path = write(name.rstrip("."), "")
    Path(path).write_bytes(KINDS[name])  # `write` would compress once more
    assert tokens(path, tokenizer) == tokens(write("plain.jsonl", JSONL), tokenizer)


TEXT = "\n".join(f"Hello, line {n}.\n\nThe sum of two and {n} is five." for n in range(30)) + "\r\n"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz.", "a.txt.zst"])
@pytest.mark.parametrize("max_length", [10, 37, 1024])
def test_a_text_fills_as_many_rows_as_it_needs(
    write: Write, tokenizer: PreTrainedTokenizerFast, name: str, max_length: int
) -> None:
    content = {"a.txt": TEXT.encode(), "a.txt.gz.": gzip.compress(TEXT.encode()), "a.txt.zst": zstd(TEXT.encode())}
    path = write(name.rstrip("."), "")
    Path(path).write_bytes(content[name])
    data = SFTDataModule(path, tokenizer=tokenizer, max_length=max_length)
    data.setup()  # a row that is cut would warn
    rows: Any = data.rows["train"]
    lengths = [len(ids) for ids in rows["input_ids"]]
    assert tokenizer.decode([token for ids in rows["input_ids"] for token in ids]) == TEXT + "<|end|>"
    assert len(lengths) == -(-sum(lengths) // max_length)
    assert max(lengths) - min(lengths) <= 1
    assert all(list(mask) == [False] + [True] * (len(mask) - 1) for mask in rows["supervised"])
    assert rows["place"][-1] == f"{path}, row 0, part {len(lengths)} of {len(lengths)}"
    counts = data.statistics["train"]
    assert (counts.rows, counts.tokens, counts.truncated_rows) == (len(lengths), sum(lengths), 0)


def test_texts_can_be_limited_and_held_out(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = SFTDataModule(
        [write("a.txt", TEXT), write("b.txt", TEXT + "more")],
        tokenizer=tokenizer,
        max_length=20,
        max_rows=10,
        validation_share=0.3,
    )
    data.setup()
    assert (data.statistics["train"].rows, data.statistics["validation"].rows) == (7, 3)


BAD: dict[str, tuple[str, bytes, str]] = {
    "cut zst": ("a.jsonl.zst", zstd(numpy.random.default_rng(0).bytes(9999).hex().encode())[:900], "cannot be read"),
    "no zst": ("a.tsv.zst", b"not an archive", r"a\.tsv\.zst cannot be read: .* Is it damaged"),
    "garbage behind": ("a.jsonl.zst", zstd(JSONL.encode()) + b"garbage", "cannot be read"),
    "cut gz": ("a.txt.gz", gzip.compress(TEXT.encode())[:-20], r"a\.txt\.gz cannot be read"),
    "long tsv row": ("a.tsv", b"text\tlabel\na\tb\tc\n", r"line 2: does not have the 2 fields .* with tabs or line br"),
    "damaged tsv": ("a.tsv", b'question\tanswer\na\tb\n"a\tb\n', r"a\.tsv cannot be read after row 0"),
    "no arrow": ("a.arrow", b"ARROW1 and so on", r"a\.arrow cannot be read"),
    "no stream": ("a.arrow", b"and so on", r"a\.arrow cannot be read"),
    "cut arrow": ("a.arrow", arrow(True)[:200], r"a\.arrow cannot be read"),
    "not UTF-8": ("a.txt", b"caf\xe9", r"a\.txt cannot be read"),
    "empty text": ("a.txt", b" \n\n", r"a\.txt has no rows"),
    "nothing in zst": ("a.jsonl.zst", zstd(b""), r"a\.jsonl\.zst has no rows"),
    "parquet in zst": ("a.parquet.zst", b"", r"unknown kind; .* all but .parquet and .arrow with .gz or .zst"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused(write: Write, tokenizer: PreTrainedTokenizerFast, case: str) -> None:
    name, content, message = BAD[case]
    path = write(name, "")
    Path(path).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        tokens(path, tokenizer)
    assert path in str(caught.value)
