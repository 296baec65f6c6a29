from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pytest
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule, tokens
from lightning_lora.errors import ConfigError
from tests.data.conftest import Write
from tests.support import warm
from tests.support.tiny_tokenizer import UNMARKED, tiny_tokenizer

ROWS = [{"question": "Hello", "answer": "five"}] * 3


def arrow_files(cache: Path) -> int:
    return len(list(cache.rglob("*.arrow")))


def places(path: str, tokenizer: PreTrainedTokenizerFast, **options: int) -> list[str]:
    data = SFTDataModule(path, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    data.setup()
    return list(data.rows["train"]["place"])


def test_tokens_are_made_once(write: Write, own_cache: Path) -> None:
    path = write("a.jsonl", ROWS)
    data = SFTDataModule(path, tokenizer=tiny_tokenizer())
    data.prepare_data()
    (made,) = own_cache.rglob("*.arrow")
    written = made.stat().st_mtime_ns
    data.setup()
    assert len(places(path, tiny_tokenizer())) == 3, "an equal tokenizer, loaded again"
    assert [file.stat().st_mtime_ns for file in own_cache.rglob("*.arrow")] == [written]


def test_whatever_changes_the_tokens_makes_them_anew(write: Write, own_cache: Path) -> None:
    path = write("a.jsonl", ROWS)
    for number, (tokenizer, options) in enumerate(
        [
            (tiny_tokenizer(), {}),
            (tiny_tokenizer(UNMARKED), {}),
            (tiny_tokenizer(starts=True), {}),
            (tiny_tokenizer(), {"max_length": 1000}),
            (tiny_tokenizer(), {"max_rows": 2}),
        ],
        start=1,
    ):
        assert len(places(path, tokenizer, **options)) == options.get("max_rows", 3)
        assert arrow_files(own_cache) == number
    write("a.jsonl", ROWS[:1])
    assert len(places(path, tiny_tokenizer())) == 1, "a file written anew"
    write("a.jsonl", [{"question": "Hello", "answer": "fife"}])
    assert len(places(path, tiny_tokenizer())) == 1, "a file of the same size written anew"
    assert arrow_files(own_cache) == 7


def test_all_code_of_the_room_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a row passes through is in this room, and each file of it changes the key."""
    used = {
        Path(module.__file__ or "") for name, module in sys.modules.items() if name.startswith("lightning_lora.data")
    }
    keys = [tokens.code_identity.__wrapped__()]
    read = Path.read_bytes
    for changed in sorted(used):
        monkeypatch.setattr(Path, "read_bytes", lambda path, changed=changed: read(path) + b"#" * (path == changed))
        keys.append(tokens.code_identity.__wrapped__())
    assert {"encoding.py", "find.py", "template.py", "reading.py"} <= {path.name for path in used}
    assert len(set(keys)) == len(keys)


FILLS = """
import sys, time
import datasets.config
from pathlib import Path
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import FileSource
from lightning_lora.data.tokens import tokenise
from tests.support import warm
from tests.support.tiny_tokenizer import tiny_tokenizer
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
here, rank = Path(sys.argv[2]), __import__("os").environ["RANK"]
(here / f"ready{rank}").touch()
while len(list(here.glob("ready*"))) < 2:
    time.sleep(0.001)
print(tokenise(FileSource(sys.argv[1]), tiny_tokenizer(), RowSettings(64), None).data.table.num_rows)
"""


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once(write: Write, own_cache: Path) -> None:
    path = write("a.jsonl", [{"question": str(n), "answer": "five"} for n in range(3500)])
    own_cache.mkdir()
    done = warm.run_ranks(2, "-c", FILLS, path, own_cache)
    assert [one.stdout.split()[-1] for one in done] == ["3500", "3500"]
    assert arrow_files(own_cache) == 1
    assert not list(own_cache.rglob("*.incomplete"))


def test_nothing_half_made_stays_after_an_error(write: Write, own_cache: Path, tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (number * 7919) for number in range(3000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[:-30])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read after row 2"):
            places(str(path), tiny_tokenizer())
    assert not [entry for entry in own_cache.rglob("*") if entry.suffix in (".arrow", ".incomplete")]


def test_a_cache_that_cannot_be_written_is_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("occupied", "a file")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "occupied" / "cache")
    with pytest.raises(
        ConfigError, match=r"cannot be written to .*occupied.*Set the environment variable HF_DATASETS_CACHE"
    ):
        places(write("a.jsonl", ROWS), tiny_tokenizer())


@pytest.fixture
def bars_on() -> Iterator[None]:
    """Progress bars as in a new process; an earlier command in this process may have disabled them."""
    off = are_progress_bars_disabled()
    enable_progress_bars()
    yield
    if off:
        disable_progress_bars()


@pytest.mark.usefixtures("bars_on")
def test_no_progress_bars_where_nobody_looks(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    places(write("a.jsonl", ROWS), tiny_tokenizer())
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_a_damaged_archive_is_named(write: Write, tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a long enough text"}\n' * 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        places(str(path), tiny_tokenizer())
