"""Python processes that start at once: each is a fork of a server that has imported everything.

``run("-m", "lightning_lora", "fit", ...)`` is ``subprocess.run([sys.executable, "-m", "lightning_lora", "fit", ...])``
without the ten seconds of imports. The process has arguments, folder, environment, streams, signal handlers and random
numbers of its own, and ends as any interpreter does. What a library reads from the environment when it is imported
(``HF_HOME``, ``HF_HUB_OFFLINE``, ``PYTHONPATH``) is that of the server: for other values, and for tests of imports,
start an interpreter with `subprocess`.
"""

from __future__ import annotations

import os
import signal
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
LIMIT = 300.0
"""Seconds that `run` waits if nothing else is said."""


def environment(**more: str) -> dict[str, str]:
    """The environment of the test, with this repository on the path, one thread, and no network."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


class Server:
    """The process that forks. It ends when its connection is closed, at the latest with the test process."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, warm_server.__file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=environment(),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._receive()

    def ask(self, *question: object) -> Any:
        """The answer to a question of `warm_server`."""
        self.connection.send(question)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError as error:
            self.log.seek(0)
            raise RuntimeError(f"the server is gone:\n{self.log.read().decode()}") from error
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
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: Path | str = os.devnull,
        stdout: Path | str = os.devnull,
        stderr: Path | str | None = None,
    ) -> None:
        request = {"arguments": [*map(str, arguments)], "cwd": str(cwd or os.getcwd()), "env": env or environment()}
        request |= {"stdin": str(stdin), "stdout": str(stdout), "stderr": str(stderr or stdout)}
        self.returncode: int | None = None
        self._server = server()
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


def run(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = LIMIT
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` to its end, and kill it with all it has started if that takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Process(*arguments, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill_all()
        return subprocess.CompletedProcess([*map(str, arguments)], code, out.read_text(), err.read_text())
