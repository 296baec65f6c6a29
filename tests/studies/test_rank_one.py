"""A study that may be stopped at any time: its runs are short here, and its model has learned next to nothing."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from lightning_lora.files.folder_lock import is_locked
from tests.support import warm

CODE = """
import sys
from pathlib import Path
from studies import rank_one
from studies.modules import digits
digits.HELD_OUT, digits.WARM_SHARE, rank_one.PROMPTS = 8, 0.0, 4
rank_one.PARTS = {name: (task, int(sys.argv[2])) for name, (task, _) in rank_one.PARTS.items()}
rank_one.run(Path(sys.argv[1]), num_seeds=1, most=int(sys.argv[3]))
"""
SECONDS = 30.0
"""From a signal to the end, on a busy machine; a run has hours left."""


def runs_of(folder: Path) -> dict[str, int]:
    """The runs that have a file, and when it was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("rank_one*/*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_at_once_and_the_next_start_does_it_again(tmp_path: Path, signum: signal.Signals) -> None:
    folder, printed = tmp_path / "runs", tmp_path / "printed"
    process = warm.Process("-c", CODE, folder, 6, 1)
    assert process.wait() == 0
    (first,) = runs_of(folder)

    process = warm.Process("-c", CODE, folder, 6000, 1, stdout=printed)
    try:
        # Lightning says it as the loop begins, after it has put its own handlers in place.
        while "adapters" not in printed.read_text() if printed.exists() else True:
            assert process.poll() is None, printed.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signum)
        assert process.wait(SECONDS) == 128 + signum
    finally:
        process.kill_all()
    assert "was ended by" in printed.read_text()
    before = runs_of(folder)
    assert list(before) == [first]
    assert not list(folder.rglob("*.lock"))

    assert warm.Process("-c", CODE, folder, 6, 1).wait() == 0
    after = runs_of(folder)
    assert len(after) == 2
    assert after[first] == before[first]


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_begun_again_and_one_that_is_done_by_another_is_left(tmp_path: Path) -> None:
    process = warm.Process("-c", CODE, tmp_path, 6000, 1)
    try:
        # A lock that is there and not yet written to is anybody's.
        while not (locks := [lock for lock in tmp_path.rglob("*.lock") if is_locked(lock)]):
            assert process.poll() is None
            time.sleep(0.05)
        # Without a signal to learn from it would soon end by itself.
        process.send_signal(signal.SIGSTOP)
        assert warm.Process("-c", CODE, tmp_path, 6, 1).wait() == 0
        (other,) = runs_of(tmp_path)
        assert other != locks[0].stem
    finally:
        process.kill_all()
    assert warm.Process("-c", CODE, tmp_path, 6, 1).wait() == 0
    assert set(runs_of(tmp_path)) == {other, locks[0].stem}
