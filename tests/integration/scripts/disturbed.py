"""Runs in processes of their own, to be disturbed: what they have printed, and how they end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.scripts import faulty
from tests.support import warm

LIMIT = 60.0
"""Seconds within which a disturbed run must have ended."""


class Run:
    """A run, in a process group of its own, or in several ranks that are started from outside, each in one.

    Args:
        folder: Where it works and where what it prints is kept.
        command: Arguments of the Python interpreter.
        ranks: Number of processes to start; a run that starts others itself is one.
    """

    def __init__(self, folder: Path, *command: str, ranks: int = 1) -> None:
        self.printed = folder / f"printed-{time.monotonic_ns()}.txt"
        self.printed.touch()
        variables = {"PYTHONWARNINGS": "ignore"}
        self.processes = [
            warm.Process(*command, cwd=folder, env=env | variables, stdout=self.printed) for env in warm.ranks(ranks)
        ]
        self.process = self.processes[0]

    @property
    def text(self) -> str:
        return self.printed.read_text()

    def wait_for(self, pattern: str, seconds: float = 200.0) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text):
                return found
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {seconds} s:\n{self.text}")

    def pid(self, rank: int) -> int:
        """The process of a rank, when it has done some steps."""
        pid = int(self.wait_for(rf"rank {rank} pid (\d+) begins")[1])
        self.wait_for(rf"(?s)(rank {rank} step .*){{3}}")
        return pid

    def worker(self) -> int:
        """A process that makes batches, when some steps are done."""
        self.pid(0)
        return int(self.wait_for(r"workers \[(\d+)")[1])

    def tell_all(self, signum: int) -> None:
        """What terminals and schedulers do."""
        for process in self.processes:
            os.killpg(process.pid, signum)

    @property
    def is_alive(self) -> bool:
        """Whether any process of it runs; one that has ended may wait for its parent for ever."""
        groups = {process.pid for process in self.processes}
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        states = (state for group, state in map(str.split, listed.splitlines()) if int(group) in groups)
        return any(state[0] != "Z" for state in states)

    def code(self) -> int:
        """The exit code of the first process, when none of the run is left."""
        code = self.process.wait(LIMIT)
        deadline = time.monotonic() + LIMIT
        while self.is_alive:
            assert time.monotonic() < deadline, f"processes of the run are left:\n{self.text}"
            time.sleep(0.05)
        return code

    @property
    def steps(self) -> list[int]:
        """Optimizer steps that it has reported."""
        return [int(step) for step in re.findall(r" step (\d+) workers", self.text)]


@contextmanager
def run(folder: Path, *command: str, ranks: int = 1) -> Iterator[Run]:
    """Start Python with these arguments; nothing of it is left afterwards."""
    started = Run(folder, *command, ranks=ranks)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill_all()


def training(folder: Path, *options: str) -> list[str]:
    """The command of a run of `faulty`."""
    return [str(faulty.__file__), str(folder), *options]
