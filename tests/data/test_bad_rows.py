"""Rows that cannot be used: one run tells of all of them, and they are left out if the user says so."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.data import SFTDataModule
from lightning_lora.data.bad_rows import BadRows, RowError
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import STRICT, UNMARKED, tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "five"}]}
SYSTEM = {"messages": [{"role": "system", "content": "Be kind."}, *GOOD["messages"]]}
EMPTY = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]}
LINES = [
    *[json.dumps(row).encode() for row in (GOOD, EMPTY, GOOD, SYSTEM)],
    b'{"messages": [',
    b'{"text": "\xe9"}',
    b"[1, 2]",
    json.dumps({"messages": [{"role": "usr", "content": "a"}]}).encode(),
    json.dumps({"messages": "Hello"}).encode(),
    json.dumps({"other": "Hello"}).encode(),
    *[json.dumps(EMPTY).encode()] * 2,
    json.dumps(GOOD).encode(),
]
"""Three good rows among ten bad ones, of seven kinds."""
FIRST_OF_KIND = [
    r"3 rows, the first: \S+, row 1 \(line 2\), messages\[1\]: .*empty",
    r"1 row: \S+, row 3 \(line 4\): the chat template refuses this conversation: no system turn, please",
    r"1 row: \S+, line 5, column 15: not JSON",
    r"1 row: \S+, line 6: not UTF-8",
    r"1 row: \S+, line 7: a row must be an object",
    r"1 row: \S+, row 7 \(line 8\), messages\[0\]: unknown role",
    r"2 rows, the first: \S+, row 8 \(line 9\): 'messages' must be a list",
]


@pytest.fixture
def path(write: Write) -> str:
    return write("a.jsonl", b"\n".join(LINES))


def module(path: str, **options: Any) -> SFTDataModule:
    return SFTDataModule(path, tokenizer=tiny_tokenizer(STRICT), **options)


def told_by(data: SFTDataModule) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup()
    return [str(warning.message) for warning in caught]


def test_one_error_tells_of_every_kind_of_bad_row(path: str) -> None:
    with pytest.raises(DataError) as caught:
        module(path).prepare_data()
    head, *kinds, advice = caught.value.message.splitlines()
    assert head == f"{path}: 10 of 13 rows cannot be used:"
    assert len(kinds) == len(FIRST_OF_KIND)
    for pattern in FIRST_OF_KIND:
        assert sum(bool(re.match(f"  {pattern}", line)) for line in kinds) == 1, (pattern, kinds)
    assert kinds[0].startswith("  3 rows"), "the most frequent kind comes first"
    assert advice.endswith("leave them out with on_bad_row: skip.")


def test_one_error_tells_of_all_sources_and_splits(path: str, write: Write) -> None:
    other = write("b.jsonl", [GOOD, EMPTY])
    data = SFTDataModule([path, other], other, tokenizer=tiny_tokenizer(STRICT))
    with pytest.raises(DataError) as caught:
        data.setup()
    assert str(caught.value).count("b.jsonl, row 1 (line 2)") == 2
    assert "10 of 13 rows cannot be used" in str(caught.value)


def test_a_bad_row_alone_reads_as_a_plain_message(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        module(write("a.jsonl", [GOOD, EMPTY])).setup()
    first, advice = caught.value.message.splitlines()
    assert re.match(r".*a\.jsonl, row 1 \(line 2\), messages\[1\]: ", first)
    assert advice == "Mend or remove such rows, or leave them out with on_bad_row: skip."


def test_bad_rows_are_left_out_and_told_once_for_each_source(path: str) -> None:
    data = module(path, on_bad_row="skip")
    data.prepare_data()
    (told,) = told_by(data)
    assert told.startswith(f"{path}: 10 of 13 rows left out (on_bad_row: skip)")
    assert all(re.search(pattern, told) for pattern in FIRST_OF_KIND)
    assert list(data.rows["train"]["place"]) == [f"{path}, row {row} (line {row + 1})" for row in (0, 2, 12)]
    assert data.statistics["train"].rows == 3
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 3


def test_what_is_done_about_bad_rows_changes_no_token(path: str, own_cache: Path) -> None:
    with pytest.raises(DataError):
        module(path).prepare_data()
    files = {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.arrow")}
    assert len(files) == 1
    first, again = (told_by(module(path, on_bad_row="skip")) for _ in range(2))
    assert first == again
    assert len(first) == 1
    with pytest.raises(DataError, match="10 of 13 rows"):
        module(path).setup()
    assert {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.arrow")} == files


@pytest.mark.parametrize("action", ["error", "skip"])
def test_a_source_of_bad_rows_only_is_an_error(write: Write, action: str) -> None:
    for name, rows in {"a.jsonl": [EMPTY] * 3, "b.jsonl": [SYSTEM] * 3}.items():
        with pytest.raises(DataError, match=rf"{name}: 3 of 3 rows cannot be used:\n  3 rows, the first: .*row 0"):
            module(write(name, rows), on_bad_row=action).setup()


def test_a_file_of_unknown_columns_is_refused_after_its_first_rows(write: Write, own_cache: Path) -> None:
    path = write("a.jsonl", [{"q": "a", "a": "b"}] * 2500)
    with pytest.raises(DataError, match="1,000 of 1,000 rows cannot be used"):
        module(path).setup()
    assert not list(own_cache.rglob("*.arrow"))


def test_bad_lines_of_a_csv_file_are_counted(write: Write) -> None:
    path = write("a.csv", "question,answer\na,b\na,b,c\na\n,b\nc,d\n")
    with pytest.raises(DataError) as caught:
        SFTDataModule(path, tokenizer=tiny_tokenizer()).setup()
    text = str(caught.value)
    assert "3 of 5 rows cannot be used" in text
    assert "2 rows, the first: " in text
    assert "a.csv, line 3: does not have the 2 fields" in text
    assert "row 3 (line 5)" in text


def test_a_damaged_file_is_an_error_even_if_rows_may_be_skipped(write: Write) -> None:
    path = write("a.csv", 'question,answer\na,b\n"a,b\n')
    with pytest.raises(DataError, match=r"a\.csv cannot be read after row 0"):
        SFTDataModule(path, tokenizer=tiny_tokenizer(), on_bad_row="skip").setup()


def test_limits_count_the_rows_of_the_file(path: str, write: Write) -> None:
    other = write("b.jsonl", [GOOD] * 9)
    data = SFTDataModule([path, other], tokenizer=tiny_tokenizer(STRICT), max_rows=15, on_bad_row="skip")
    assert len(told_by(data)) == 1
    assert data.statistics["train"].rows == 3 + 2


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"on_bad_row must be one of .*, got 'skp'; did you mean 'skip'\?"):
        SFTDataModule("a.jsonl", on_bad_row="skp")


def test_of_many_kinds_the_most_frequent_ten_are_told() -> None:
    found = BadRows("a.jsonl", rows=200)
    for kind in range(14):
        for row in range(kind + 1):
            found.add(RowError(f"a.jsonl, row {row}", f"fault {kind}"))
    lines = str(found).splitlines()
    assert lines[0] == "a.jsonl: 105 of 200 rows cannot be used:"
    assert lines[1].startswith("  14 rows, the first: a.jsonl, row 0: fault 13")
    assert len(lines) == 12
    assert lines[-1] == "  10 rows with 4 further faults"


def test_row_errors_survive_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(RowError("a.jsonl, row 3", "is empty", " (5).")))
    assert (error.message, error.kind, error.detail) == ("a.jsonl, row 3: is empty (5).", "is empty", " (5).")


def test_names_that_nothing_reads_are_told_once_for_each_source(write: Write) -> None:
    rows = [{"id": n, "question": "Hello", "answer": "five"} | ({"more": "a"} if n % 2 else {}) for n in range(4)]
    data = SFTDataModule([write("a.jsonl", rows), write("b.jsonl", rows[:1])], tokenizer=tiny_tokenizer(UNMARKED))
    for _ in range(2):
        first, second = told_by(data)
        assert re.search(r"a\.jsonl: nothing reads 'id' \(4 rows\), 'more' \(2 rows\)\.", first)
        assert re.search(r"b\.jsonl: nothing reads 'id' \(1 row\)\.", second)
