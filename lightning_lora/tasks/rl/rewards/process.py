"""A worker process seen from the process that trains."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from lightning_lora.tasks.rl.rewards import worker
from lightning_lora.tasks.rl.rewards.worker import LENGTH, Answer, Call


class Process:
    """One worker: it is sent a list of calls and answers them one after the other.

    Args:
        reward: The reward, pickled.
        timeout: Seconds of one call at most; None sets no limit.

    Attributes:
        ready: Whether the reward is loaded.
        pending: Numbers of the calls that it has not answered yet.
    """

    def __init__(self, reward: bytes, timeout: float | None) -> None:
        self.child = subprocess.Popen(
            [sys.executable, worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Threads of several workers would compete for the same cores.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the process that waits; a kill reaches what the reward has started
        )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.calls, self.answers = self.child.stdin, self.child.stdout
        self.timeout = timeout
        self.ready = False
        self.pending: list[int] = []
        self._read = bytearray()
        self._since = time.monotonic()
        with suppress(BrokenPipeError):  # `receive` tells of a process that has ended
            self.calls.write(pickle.dumps(sys.path) + pickle.dumps(timeout) + reward)
            self.calls.flush()

    def fileno(self) -> int:
        """What `select` waits for."""
        return self.answers.fileno()

    def send(self, numbers: list[int], calls: list[Call]) -> None:
        """Send calls, whose numbers come back with their answers."""
        self.pending = list(numbers)
        self._since = time.monotonic()
        with suppress(BrokenPipeError):
            # Plain tuples: the worker knows no class of this package.
            self.calls.write(pickle.dumps([tuple(call) for call in calls]))
            self.calls.flush()

    def receive(self) -> list[tuple[int, Answer]] | None:
        """Answers that have come, each with the number of its call; None if the process has ended.

        Raises:
            ImportError: If the worker cannot load the reward.
        """
        data = os.read(self.fileno(), 1 << 20)
        if not data:
            return None
        self._read += data
        self._since = time.monotonic()
        found = []
        for message in self._messages():
            if self.ready:
                found.append((self.pending.pop(0), message))
            elif message is not None:
                raise ImportError(message)
            self.ready = True
        return found

    def _messages(self) -> Iterator[Answer | str | None]:
        """The whole messages among the bytes read."""
        while len(self._read) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._read)[0]
            if len(self._read) < end:
                return
            message = bytes(self._read[LENGTH.size : end])
            del self._read[:end]
            yield pickle.loads(message)  # of our own process

    def seconds_left(self) -> float:
        """Until the call that is running has used up its time."""
        if self.timeout is None or not (self.ready and self.pending):
            return float("inf")
        return self._since + self.timeout - time.monotonic()

    def how_it_ended(self) -> str:
        """Waits for a process whose output is closed."""
        code = self.child.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}; was there too little memory?"
        return f"ended its process with code {code}"

    def kill(self) -> None:
        """End it and what it has started, whatever it does."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.calls, self.answers):
            with suppress(OSError):
                pipe.close()
