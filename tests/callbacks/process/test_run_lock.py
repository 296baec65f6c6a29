"""A lock of a living process holds, a lock of a dead one is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import RunFolderError
from lightning_lora.callbacks import RunLock
from lightning_lora.files.folder_lock import release_lock, take_lock
from tests.support import toys, warm
from tests.support.toys import Toy

pytestmark = toys.expected_warnings

FILE = ".run.lock"

HOLD = """
import sys, time
from pathlib import Path
from lightning_lora.files.folder_lock import take_lock
take_lock(Path(sys.argv[1]) / ".run.lock", Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[warm.Process]:
    """Another process that holds the lock."""
    with tempfile.NamedTemporaryFile() as printed:
        process = warm.Process("-c", HOLD, folder, stdout=printed.name)
        try:
            while printed.read() != b"locked\n":
                assert process.poll() is None
                printed.seek(0)
            yield process
        finally:
            process.kill_all()


def fit(folder: Path, *callbacks: Callback, **options: Any) -> None:
    toys.trainer(folder, callbacks=[RunLock(), *callbacks], **options).fit(Toy(), toys.loader())


def test_a_second_process_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        words = (
            rf"another run writes in {tmp_path}: process {other.pid} on {socket.gethostname()}, started 0:00:\d\d ago"
        )
        with pytest.raises(RunFolderError, match=words):
            fit(tmp_path)
        assert json.loads((tmp_path / FILE).read_text())["pid"] == other.pid
        other.send_signal(signal.SIGKILL)
        other.wait()
        with pytest.warns(UserWarning, match=rf"took over .* from process {other.pid} on .*died without removing"):
            fit(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_the_lock_stands_while_the_run_does_and_goes_with_it(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()

    fit(tmp_path, Look())
    assert not (tmp_path / FILE).exists()


def test_it_goes_after_an_error_too(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Failing())
    assert not (tmp_path / FILE).exists()


def test_a_refused_run_leaves_the_lock_of_the_other(tmp_path: Path) -> None:
    lock = write_lock(tmp_path, host="elsewhere")
    with pytest.raises(RunFolderError, match=r"process 1 on elsewhere, started .*; if you know .* delete .*run.lock"):
        fit(tmp_path)
    assert (tmp_path / FILE).read_text() == lock


def test_a_job_that_slurm_starts_again_elsewhere_takes_its_lock_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lock(tmp_path, host="elsewhere", job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(RunFolderError, match="another run"):  # another step of the same job
        take_lock(tmp_path / FILE, tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "took over" in str(take_lock(tmp_path / FILE, tmp_path))


def test_a_new_process_with_the_number_of_a_dead_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=os.getppid(), born="long ago")
    assert "took over" in str(take_lock(tmp_path / FILE, tmp_path))
    release_lock(tmp_path / FILE)
    assert not (tmp_path / FILE).exists()


def test_a_lock_cut_off_by_a_crash_holds_nobody_back(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"pid": 12')
    fit(tmp_path)


@pytest.mark.parametrize(("first", "outcome"), [("wins", "refused"), ("has ended", "taken")])
def test_two_at_the_same_moment_take_turns(first: str, outcome: str, tmp_path: Path) -> None:
    path, outcomes = tmp_path / FILE, []

    def take() -> None:
        try:
            take_lock(path, tmp_path)
            outcomes.append("taken")
        except RunFolderError:
            outcomes.append("refused")

    second = threading.Thread(target=take)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the first does to look
        second.start()
        second.join(0.3)
        assert not outcomes
        if first == "wins":
            write_lock(tmp_path, host="elsewhere")
        else:
            path.unlink()
    second.join(30)
    assert outcomes == [outcome]
    assert json.loads(path.read_text())["host"] == ("elsewhere" if first == "wins" else socket.gethostname())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot write in .*file/run: Not a directory. Choose another folder"):
        fit(tmp_path / "file" / "run")


def test_a_logger_does_not_delete_the_metrics_of_a_run_that_holds_the_folder(tmp_path: Path) -> None:
    runner = toys.trainer(tmp_path, logger=CSVLogger(tmp_path, "runs", version="one"))
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("kept")
    write_lock(folder.parent, ".one.lock", host="elsewhere")
    with pytest.raises(RunFolderError, match=rf"another run writes in {folder}: process 1 on elsewhere"):
        RunLock().acquire(runner)
    assert (folder / "metrics.csv").read_text() == "kept"
    assert [entry.name for entry in folder.iterdir()] == ["metrics.csv"]


def write_lock(folder: Path, name: str = FILE, **changes: Any) -> str:
    fields = {"pid": 1, "host": socket.gethostname(), "born": "", "started": "2026-01-01T00:00:00+00:00"}
    fields |= {"job": "", "restart": 0}
    text = json.dumps(fields | changes)
    (folder / name).write_text(text)
    return text
