"""Python processes that start at once: each is a fork of a server that has imported everything.

``run("-m", "lightning_lora", "fit", ...)`` does what ``python -m lightning_lora fit ...`` does, without the ten seconds
of imports. The process has arguments, folder, environment, streams, signal handlers and random numbers of its own.
Variables that libraries read while they are imported (``HF_HOME``, ``HF_HUB_OFFLINE``, ``PYTHONPATH``) have the values
of the server: for other values, and to test imports, use `run_cold`.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from tests.support import warm_server

ROOT = Path(__file__).parents[2]
LIMIT, GRACE = 300.0, 30.0
"""Seconds that processes may take, and that other ranks may go on after one has failed."""
Done = subprocess.CompletedProcess[str]


def environment(*first: Path, **more: str) -> dict[str, str]:
    """The environment of the test, with ``first`` and this repository on the path, one thread, and no network."""
    path = os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def free_port() -> str:
    """A port of this machine where nobody listens.

    The system gives ports above these to connections: such a port may be taken by the time a process listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(16_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return str(port)


class Server:
    """The process that forks. It ends when its connection is closed, at the latest with the test process.

    Args:
        path: Folders to import from before all others.
    """

    def __init__(self, *path: Path) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, warm_server.__file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=environment(*path),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        atexit.register(self.close)
        self._receive()

    def close(self) -> None:
        """End the server, and with it all that it has started."""
        self.connection.close()
        self.process.wait()
        self.log.close()

    def ask(self, *question: object) -> Any:
        """The answer to a question of `warm_server`."""
        self.connection.send(question)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError as error:
            self.log.seek(0)
            raise RuntimeError(f"the server that forks has ended:\n{self.log.read().decode()}") from error
        except BaseException:  # a test that is told to stop: its answer must not be taken for that of another question
            self.connection.close()
            raise


_server: Server | None = None


def server() -> Server:
    """The server of this test process, started when it is first needed."""
    global _server
    if _server is None or _server.connection.closed or _server.process.poll() is not None:
        _server = Server()
    return _server


class Process:
    """A running ``python *arguments``, the first of a process group: what `subprocess.Popen` is to other commands.

    Args:
        arguments: The command line after ``python``.
        cwd: Working folder; that of the test if not given.
        env: Environment variables; `environment` if not given.
        stdin: File that is read.
        stdout: File to which output is appended; a terminal may be given by its name.
        stderr: The same for errors; the file of ``stdout`` if not given.
        forked_by: The server; that of this test process if not given.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: Path | str = os.devnull,
        stdout: Path | str = os.devnull,
        stderr: Path | str | None = None,
        forked_by: Server | None = None,
    ) -> None:
        request = {"arguments": [*map(str, arguments)], "cwd": str(cwd or os.getcwd()), "env": env or environment()}
        request |= {"stdin": str(stdin), "stdout": str(stdout), "stderr": str(stderr or stdout)}
        self.returncode: int | None = None
        self._server = forked_by or server()
        self.pid: int = self._server.ask("start", request)

    def poll(self) -> int | None:
        """The exit code, as `subprocess` gives it, or ``None`` while the process runs."""
        if self.returncode is None:
            self.returncode = self._server.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        """The exit code, once the process has ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"python, process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, signum: int) -> None:
        """Send a signal to this process, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill_all(self) -> None:
        """Kill this process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def ranks(count: int) -> list[dict[str, str]]:
    """Environments of ``count`` ranks of one group, which are started from outside as on a cluster."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if count == 1:
        return [environment(**place)]
    group = {"WORLD_SIZE": str(count), "NODE_RANK": "0"} | place
    return [environment(RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(count)]


def run(*arguments: object, cwd: Path | None = None, forked_by: Server | None = None, **variables: str) -> Done:
    """Run ``python *arguments`` to its end, with ``variables`` in its environment."""
    return run_ranks(1, *arguments, cwd=cwd, check=False, forked_by=forked_by, **variables)[0]


def run_ranks(
    count: int,
    *arguments: object,
    cwd: Path | None = None,
    check: bool = True,
    forked_by: Server | None = None,
    **variables: str,
) -> list[Done]:
    """Run ``python *arguments`` to its end as ranks of one group.

    Ranks that take too long, or go on for long after another has failed, are killed.

    Args:
        count: Number of ranks.
        arguments: The command line after ``python``.
        cwd: Working folder; that of the test if not given.
        check: Whether every rank must end with code 0.
        forked_by: The server; that of this test process if not given.
        variables: More environment variables.
    """
    with tempfile.TemporaryDirectory() as name:
        files = [(Path(name, f"{rank}.out"), Path(name, f"{rank}.err")) for rank in range(count)]
        processes = [
            Process(*arguments, cwd=cwd, env=env | variables, stdout=out, stderr=err, forked_by=forked_by)
            for env, (out, err) in zip(ranks(count), files, strict=True)
        ]
        try:
            _wait_for_all(processes)
        finally:
            for process in processes:
                process.kill_all()
        done = [
            Done([*map(str, arguments)], process.wait(), out.read_text(), err.read_text())
            for process, (out, err) in zip(processes, files, strict=True)
        ]
    failed = [
        f"rank {rank}: {one.stdout[-3000:]}\n{one.stderr[-6000:]}" for rank, one in enumerate(done) if one.returncode
    ]
    assert not check or not failed, "\n".join(failed)
    return done


def _wait_for_all(processes: list[Process]) -> None:
    deadline = time.monotonic() + LIMIT
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.01)


def run_cold(*arguments: object, code: int = 0, **variables: str) -> Done:
    """Run ``python *arguments`` in an interpreter that starts from nothing; it must end with ``code``."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done
