"""Rows that several processes tokenise."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_lora.data.processes import map_in_order
from lightning_lora.data.reading import Row
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import FileSource
from lightning_lora.data.token_table import Chunk, ToTokens
from lightning_lora.data.tokens import tokenise
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.support import toys
from tests.support.tiny_tokenizer import tiny_tokenizer

SETTINGS = RowSettings(64)


def children() -> list[int]:
    """Process ids of the children of this process."""
    tasks = Path("/proc/self/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def chunks(count: int) -> Iterator[Chunk]:
    for start in range(count):
        yield Chunk(start, [Row(f"row {start}", {"question": f"{start}", "answer": "five"})])


def test_results_come_in_order_for_more_items_than_processes_hold() -> None:
    assert list(map_in_order(abs, range(-40, 0), 2)) == list(range(40, 0, -1))


UNGUARDED = """
import json, sys
import datasets.config
from lightning_lora.data import SFTDataModule
from tests.support.tiny_tokenizer import tiny_tokenizer
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
for num_proc in (2, 1):
    data = SFTDataModule(sys.argv[1], tokenizer=tiny_tokenizer(), on_bad_row="skip", num_proc=num_proc, max_length=40)
    data.setup()
    print(json.dumps([data.rows["train"].to_list(), data.statistics["train"].rows]))
    open(sys.argv[1], "a").write("\\n")  # the cached tokens are not of this file
"""


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_tokens_in_the_same_order(write: Write, own_cache: Path) -> None:
    """In a script without a guard around what it does, which `multiprocessing` would run again in each process."""
    rows = [json.dumps({"question": "x" * (1 + n % 70), "answer": str(n)}) for n in range(2500)]
    rows[1234] = "{bad"
    rows[2321] = json.dumps({"question": "Hello"})
    path = write("a.jsonl", "\n".join(rows) + "\n")
    done = toys.run_python(UNGUARDED, path, own_cache)
    several, one = done.stdout.splitlines()
    assert several == one
    assert 1000 < json.loads(one)[1] < 2498, "some rows lose their answer"
    assert "2 of 2,500 rows left out" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds its children in /proc")
def test_a_killed_process_is_an_error(write: Write, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FileSource.rows

    def killing(self: FileSource) -> Iterator[Row]:
        yield from rows(self)  # type: ignore[misc]
        for pid in children():
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(FileSource, "rows", killing)
    source = FileSource(write("a.jsonl", [{"question": str(n), "answer": "five"} for n in range(1500)]))
    before = set(children())
    with pytest.raises(DataError, match="a process that tokenises was killed by signal 9"):
        tokenise(source, tiny_tokenizer(), SETTINGS, None, num_proc=2)
    assert set(children()) <= before
    assert not list(own_cache.rglob("*.arrow"))


@pytest.mark.slow
def test_an_error_in_a_process_is_that_error() -> None:
    silent = tiny_tokenizer(None)
    silent.eos_token = None
    function = ToTokens(silent, SETTINGS, next(chunks(1)).rows[0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token"):
        list(map_in_order(function, chunks(3), num_proc=2))


def test_one_process_is_this_process() -> None:
    before = set(children()) if Path("/proc/self/task").exists() else set()
    function = ToTokens(tiny_tokenizer(), SETTINGS, next(chunks(1)).rows[0])  # type: ignore[arg-type]
    tables = map_in_order(function, chunks(3), num_proc=1)
    assert next(tables)["place"].to_pylist() == ["row 0"]
    if before:
        assert set(children()) == before
