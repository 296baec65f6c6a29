from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import HubSource, find_sources
from lightning_lora.data.tokens import tokenise
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import tiny_tokenizer

SAMPLES = [(f"What is {n} and {n}?\n\nThink, é{n}.", f" {2 * n}, of course; NA") for n in range(20)]
FORMATS: dict[str, Any] = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "output": lambda q, a: {"instruction": q, "output": a},
    "input": lambda q, a: {"instruction": q.split("\n\n")[0], "input": q.split("\n\n")[1], "output": a},
    "empty input": lambda q, a: {"instruction": q, "input": "", "response": a},
    "null input": lambda q, a: {"instruction": q, "input": None, "response": a},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "answer": lambda q, a: {"id": 7, "question": q, "answer": a, "text": "not this"},
}
PAIRS = [{"question": q, "answer": a} for q, a in SAMPLES]


def tokens(path: str | list[str], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[bool]]]:
    data = SFTDataModule(path, tokenizer=tokenizer)
    data.setup()
    return [(row["input_ids"], row["supervised"]) for row in data.rows["train"]]  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*nothing reads 'id'")
@pytest.mark.parametrize("template", ["marked", "none"])
def test_every_format_gives_the_same_tokens(write: Write, template: str) -> None:
    tokenizer = tiny_tokenizer() if template == "marked" else tiny_tokenizer(template=None)
    seen = {
        name: tokens(write(f"{number}.jsonl", [row(*sample) for sample in SAMPLES]), tokenizer)
        for number, (name, row) in enumerate(FORMATS.items())
    }
    assert all(rows == seen["messages"] for rows in seen.values())
    for (ids, supervised), (question, answer) in zip(seen["messages"], SAMPLES, strict=True):
        assert tokenizer.decode([i for i, used in zip(ids, supervised, strict=True) if used]) == answer + "<|end|>"
        assert question in tokenizer.decode(ids)


def test_every_kind_of_file_gives_the_same_tokens(
    write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(PAIRS)
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    files = [
        write("a.jsonl", PAIRS),
        write("lines.json", [*PAIRS[:3]]),
        write("a.json", json.dumps(PAIRS)),
        write("pretty.json", "\ufeff\n" + json.dumps(PAIRS, indent=2)),
        write("blank.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in PAIRS)),
        write("a.jsonl.gz", PAIRS),
        write("a.json.gz", json.dumps(PAIRS)),
        write("a.csv.gz", (tmp_path / "a.csv").read_bytes().decode()),
        str(tmp_path / "a.csv"),
        str(tmp_path / "a.parquet"),
    ]
    expected = tokens(files[0], tokenizer)
    assert len(expected) == 20
    for file in files[1:]:
        assert tokens(file, tokenizer) == expected[: 3 if "lines" in file else None], file


def test_a_list_and_a_glob_are_read_in_order(write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    second, first = write("b.jsonl", PAIRS[10:]), write("a.jsonl", PAIRS[:10])
    expected = tokens(write("whole.json", PAIRS), tokenizer)
    assert tokens([first, second], tokenizer) == expected
    assert tokens(str(tmp_path / "*.jsonl"), tokenizer) == expected
    assert tokens([second, first], tokenizer) == expected[10:] + expected[:10]


def test_a_file_with_a_bracket_in_its_name_is_a_file(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokens(write("a [1].jsonl", PAIRS), tokenizer)) == 20


@pytest.mark.filterwarnings("ignore:.*nothing reads 'id'")
def test_files_of_different_formats_go_together(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    files = [write(f"{n}.jsonl", [row(*SAMPLES[0])]) for n, row in enumerate(FORMATS.values())]
    assert len({str(row) for row in tokens(files, tokenizer)}) == 1


def test_texts_that_look_like_dates_stay_texts(write: Write) -> None:
    """pyarrow's JSON reader would convert them to timestamps."""
    tokenizer = tiny_tokenizer()
    rows = [{"question": "When?", "answer": "2020-01-01"}, {"question": "And then?", "answer": "2021-02-03"}]
    assert ["2020-01-01" in tokenizer.decode(ids) for ids, _ in tokens(write("a.jsonl", rows), tokenizer)] == [
        True,
        False,
    ]


def test_limits_take_the_first_rows_across_files(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    files = [write("a.jsonl", PAIRS[:10]), write("b.jsonl", PAIRS[10:])]
    data = SFTDataModule(files, files, files, tokenizer=tokenizer, max_rows=12, validation_rows=3)
    data.setup()
    assert {split: statistics.rows for split, statistics in data.statistics.items()} == {
        "train": 12,
        "validation": 3,
        "test": 20,
    }
    assert list(data.rows["train"]["input_ids"]) == list(data.rows["test"]["input_ids"])[:12]


def test_a_hub_dataset_is_read_like_a_file(write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Read from a folder laid out as on the hub; names are told apart in test_bad_input.py."""
    (tmp_path / "hub").mkdir()
    write("hub/train.jsonl", PAIRS)
    source = HubSource(str(tmp_path / "hub"), None, "train")
    ours = tokenise(source, tokenizer, RowSettings(1024), limit=12)
    assert list(ours["place"])[:2] == [f"{tmp_path / 'hub'}:train, row {row}" for row in range(2)]
    rows = zip(ours["input_ids"], ours["supervised"], strict=True)
    assert list(rows) == tokens(write("a.jsonl", PAIRS), tokenizer)[:12]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("gsm8k", HubSource("gsm8k", None, "validation")),
        ("openai/gsm8k", HubSource("openai/gsm8k", None, "validation")),
        ("openai/gsm8k:test", HubSource("openai/gsm8k", None, "test")),
        ("openai/gsm-8.k:main:test", HubSource("openai/gsm-8.k", "main", "test")),
    ],
)
def test_a_name_that_can_be_no_path_is_a_hub_name(name: str, source: HubSource) -> None:
    assert find_sources(name, "validation") == [source]
