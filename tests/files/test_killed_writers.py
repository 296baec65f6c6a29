"""A writer killed at any moment leaves the old folder or the new one, and the next write clears up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.atomic import atomic_folder
from tests.support.adapter_files import dead_pid, leftover, write_folder


def test_what_killed_writers_left_is_removed_and_counted_once(tmp_path: Path) -> None:
    pid, target = dead_pid(), tmp_path / "a"
    leftover(target, pid).mkdir()
    (leftover(target, pid) / "half").touch()
    leftover(target, os.getpid()).touch()  # this process number in an earlier life, as in a restarted container
    kept = [
        leftover(target, os.getppid()),  # alive
        leftover(target, pid, host="0" * 8),  # on another machine
        leftover(tmp_path / "a.b", pid),  # of another target
        tmp_path / f".a.{pid}.tmp",  # not our pattern
    ]
    for path in kept:
        path.touch()
    message = r"removed 2 unfinished temporary copies of .*a left"
    with pytest.warns(UserWarning, match=message) as warned, atomic_folder(target, replaces=CONFIG_FILE):
        pass
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


def test_the_old_folder_is_put_back_if_the_writer_died_between_two_renames(tmp_path: Path) -> None:
    aside = leftover(tmp_path / "a", dead_pid(), "old")
    write_folder(aside, "old")
    with (
        pytest.warns(UserWarning, match="put .*a back"),
        pytest.raises(RuntimeError),
        atomic_folder(tmp_path / "a", replaces=CONFIG_FILE),
    ):
        raise RuntimeError
    assert (tmp_path / "a" / CONFIG_FILE).read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


# One process imports the package and forks a writer per line it reads: an import per trial would take seconds.
WRITERS = """
    import os, sys
    from lightning_lora.files.atomic import atomic_folder
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            os.waitpid(pid, 0)
            print("dead", flush=True)
            continue
        number = int(line)
        while True:
            with atomic_folder(sys.argv[1], replaces="adapter_config.json") as folder:
                for name in ("adapter_config.json", "weights", "manifest"):
                    (folder / name).write_bytes(number.to_bytes(4, "little") * 50_000)
            number += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:removed . unfinished:UserWarning")
def test_killed_at_any_moment_the_folder_is_wholly_old_or_wholly_new(tmp_path: Path) -> None:
    target, moments = tmp_path / "adapter", random.Random(0)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITERS), str(target)]
    killed_in_the_middle = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for trial in range(10):
            print(trial * 10_000 + 1, file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            time.sleep(moments.uniform(0.02, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert server.stdout.readline() == "dead\n"
            if target.exists():  # the first may die before its first folder is whole
                check_whole(target)
            killed_in_the_middle += len(os.listdir(tmp_path)) > target.exists()
        server.stdin.close()
    assert target.exists()
    assert killed_in_the_middle
    write_folder(target, "last")
    assert os.listdir(tmp_path) == ["adapter"]


def check_whole(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == [CONFIG_FILE, "manifest", "weights"]
    contents = {file.read_bytes() for file in folder.iterdir()}
    assert len(contents) == 1
    content = contents.pop()
    assert content == content[:4] * 50_000
