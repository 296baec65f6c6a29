from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest

from lightning_lora.errors import RunFolderError
from lightning_lora.files.folder_lock import take_lock
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.run_cell import as_run_error, drop_foreign_locks
from lightning_lora.study.matched.store import Claim, Store
from lightning_lora.study.matched.worker import LeaseLostError, RunCell, RunError, Worker
from tests.study.matched import planted


def worker(folder: Path, run: RunCell, lines: list[str], lease: float = 120.0) -> Worker:
    store = Store(f"sqlite:///{folder / 'study.sqlite'}", "planted", lease)
    store.open({"fixed": {}, "arms": {}})
    return Worker(planted.spec(("full", "rank 8")), planted.DATA, folder, store, run, lines.append)


def test_a_line_for_each_run_says_how_far_the_study_is(tmp_path: Path) -> None:
    lines: list[str] = []
    worker(tmp_path, lambda cell, folder, lost: planted.outcome(planted.planted_loss(cell)), lines).work()
    assert lines[0].startswith("1 of about 17: untrained base: loss 3.0000, 0 s; about")
    count = len(lines)
    assert count / 2 <= int(lines[2].split()[3].rstrip(":")) <= 2 * count, "after the third run"
    assert lines[-1].startswith(f"{count} of about {count}: ")
    assert lines[-1].endswith("the last one that is known of")


@pytest.mark.parametrize(
    "durations", [{"full": 60, "rank 8": 60}, {"full": 90, "rank 8": 50}, {"full": 900, "rank 8": 600}]
)
def test_after_the_third_run_the_time_that_is_left_is_right_within_a_factor_of_two(
    durations: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(
        "lightning_lora.study.matched.worker.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    )
    lines: list[str] = []
    ended: list[float] = []

    def run(cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        now[0] += durations.get(cell.arm, 1)  # the untrained base is only scored
        ended.append(now[0])
        return planted.outcome(planted.planted_loss(cell))

    worker(tmp_path, run, lines).work()
    assert len(lines) == len(ended) >= 12
    found = re.search(r"about ([\d.]+) (s|min|h) left", lines[2])
    assert found
    told = float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]
    assert 0.5 < told / (now[0] - ended[2]) < 2


def test_a_run_whose_folder_is_still_in_use_is_left_until_it_is_free(tmp_path: Path) -> None:
    tries = []

    def run(cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        tries.append(cell.key)
        if len(tries) < 3:
            raise as_run_error(RunFolderError("another run writes there"))
        return planted.outcome(planted.planted_loss(cell))

    done = worker(tmp_path, run, [], lease=0.5)
    done.work()
    assert {status.state for status in done.store.statuses()} == {"done"}
    assert done.store.statuses()[0].attempt == 3


def test_a_worker_that_slept_too_long_stops_its_run_and_writes_nothing(tmp_path: Path) -> None:
    first, lines = threading.Event(), list[str]()

    def slow(cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        first.set()
        assert lost.wait(10), "the beat finds out"
        raise LeaseLostError

    sleeper = worker(tmp_path, slow, lines, lease=0.6)
    thread = threading.Thread(target=sleeper._do, args=([_claimed(sleeper)], sleeper.plan()[0]))
    thread.start()
    assert first.wait(5)
    other = Store(sleeper.store.url, "planted", 60)
    other.owner = "other"
    with other._database.transaction() as transaction:
        transaction.execute("UPDATE ll_cell SET attempt = attempt + 1, owner = 'other'")
    thread.join(10)
    assert lines == [f"{other.statuses()[0].cell.run}: another worker has taken this run over"]
    assert other.statuses()[0].state == "running"


def _claimed(it: Worker) -> Claim:
    it.plan()
    claim = it.store.claim()
    assert claim is not None
    return claim


def test_an_interrupted_worker_gives_its_run_back(tmp_path: Path) -> None:
    def stopped(cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        raise KeyboardInterrupt

    it = worker(tmp_path, stopped, [])
    with pytest.raises(KeyboardInterrupt):
        it.work()
    assert [(run.state, run.attempt) for run in it.store.statuses()] == [("ready", 1)]


def test_a_failed_run_is_told_once_more_only_if_it_may_succeed(tmp_path: Path) -> None:
    lines: list[str] = []

    def broken(cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        raise RunError("no rows", is_final=True)

    plan = worker(tmp_path, broken, lines).work()
    assert lines == ["failed: untrained base: no rows"]
    assert "cannot be scored: no rows" in plan.verdicts[0].sentence


def test_the_lock_of_another_machine_is_taken_over_and_that_of_this_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = folder / ".run.lock"
    take_lock(lock, folder)
    drop_foreign_locks(folder)
    assert lock.exists()
    held = json.loads(lock.read_text())
    lock.write_text(json.dumps(held | {"host": "elsewhere"}))
    drop_foreign_locks(folder)
    assert not lock.exists()
