"""When one process of a run is lost, the others say so and end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import _get_default_store  # every process group has one; no public access
from typing_extensions import override

from lightning_lora.errors import ConfigError

LOOK_SECONDS = 1.0  # between two looks at processes of this host
NUM_BEATS = 8  # within the timeout
GRACE_SECONDS = 10.0  # for the main thread to end by its own error, which says more
STORE_SECONDS = 2.0  # for the store to answer a process that is ending

_NUMBERS = itertools.count()


class RankWatch(Callback):
    """Ends a run of several processes when one of them is lost, and says which; on one process it does nothing.

    A lost process leaves the others waiting in a collective: for gloo until the connection breaks, for NCCL up to half
    an hour. A thread beside the training sees it within seconds where the process is on the same host, and by missing
    heartbeats elsewhere. It prints which rank was lost, gives the main thread 10 seconds to end by its own error, and
    then ends this process with code 1. A process that is busy still beats; one that is stopped (SIGSTOP) counts as
    lost.

    Args:
        timeout: Seconds without a heartbeat after which a rank on another host counts as lost, at least 5.

    Raises:
        ConfigError: If ``timeout`` is less than 5.
    """

    def __init__(self, timeout: float = 30.0) -> None:
        if timeout < 5:
            raise ConfigError(f"timeout must be at least 5 seconds, got {timeout}.")
        self.timeout = timeout
        self._watch: _Watch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start watching: the processes know each other now."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized() and self._watch is None:
            self._watch = _Watch(trainer, self.timeout)
            self._watch.start()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others why this process ends, and the user if another's end is the reason."""
        if self._watch is not None:
            if isinstance(exception, Exception):
                self._watch.explain(exception)
            self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


class _Watch(threading.Thread):
    """Beats for this rank and listens to the others: rank 0 to all, the others to rank 0, whose word they take."""

    def __init__(self, trainer: Trainer, timeout: float) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.rank, self.local_rank, self.timeout = trainer.global_rank, trainer.local_rank, timeout
        # A connection of its own, which the main thread cannot block, and names that the watch before has not used.
        store: Any = _get_default_store()
        self.store = dist.PrefixStore(f"lightning_lora.rank_watch.{next(_NUMBERS)}", store.clone())
        self.children: list[subprocess.Popen[Any]] = list(getattr(trainer.strategy.launcher, "procs", []))
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
        self.parent = os.getppid() if is_child else None
        others = range(1, trainer.world_size) if self.rank == 0 else (0,)
        # Time is counted in what this process has done: one that was suspended with the others has not waited for them.
        self.heard = {other: (b"", 0) for other in others}
        self.said: str | None = None
        self._ended = threading.Event()
        self._found: str | None = None
        self._unanswered = 0.0
        self._beating = threading.Thread(target=self._beat, name="rank-watch-beats", daemon=True)

    @override
    def start(self) -> None:
        super().start()
        self._beating.start()

    @override
    def run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._unanswered += LOOK_SECONDS
            lost = self._lost_here() or self._found
            if lost is None and 0 in self.heard and self._unanswered > self.timeout:
                lost = f"rank 0 does not answer for {self._unanswered:.0f} s"
            if lost is not None:
                self._end(lost)
                return

    def stop(self) -> None:
        """End the threads; a rank that has left in order is not missed."""
        self._ended.set()
        self._tell(f"left/{self.rank}", "in order")
        for thread in (self, self._beating):
            thread.join(STORE_SECONDS)

    def explain(self, exception: Exception) -> None:
        """Say why this rank ends: to the others its error, to the user the loss of another rank that caused it."""
        self._ended.set()
        self._tell("lost", f"rank {self.rank} ended by {type(exception).__name__}: {str(exception)[:500]}")
        deadline = time.monotonic() + LOOK_SECONDS  # the system takes a moment to report a process's end
        lost = self._lost_here()
        while lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
            lost = self._lost_here()
        if lost is not None:
            self._say(lost)

    def _lost_here(self) -> str | None:
        """What processes of this host say."""
        for number, child in enumerate(self.children, start=1):
            if code := child.poll():
                by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                return f"rank {self.rank + number} (process {child.pid}) {by}"
        if self.parent is not None and os.getppid() != self.parent:
            return f"rank {self.rank - self.local_rank} (process {self.parent}) is gone"
        return None

    def _beat(self) -> None:
        """In a thread of its own: the store blocks where the machine of rank 0 is silent."""
        beats = 0
        while not self._ended.is_set():
            beats += 1
            try:
                self._found = self._found or self._lost_elsewhere(beats)
            except RuntimeError as error:  # torch's own errors of the store
                if 0 in self.heard:
                    self._found = f"rank 0 does not answer ({str(error).splitlines()[0]})"
                return
            self._unanswered = 0.0
            self._ended.wait(self.timeout / NUM_BEATS)

    def _lost_elsewhere(self, beats: int) -> str | None:
        """What the heartbeats say."""
        self.store.set(f"beat/{self.rank}", str(beats))
        if self.store.check(["lost"]):
            return self.store.get("lost").decode()
        for other, (last, when) in list(self.heard.items()):
            if self.store.check([f"left/{other}"]):
                del self.heard[other]
                continue
            beat = self.store.get(f"beat/{other}") if self.store.check([f"beat/{other}"]) else b""
            if beat != last:
                self.heard[other] = (beat, beats)
            elif last and beats - when > NUM_BEATS:
                return f"rank {other} gave no sign of life for {self.timeout:.0f} s"
        return None

    def _tell(self, key: str, text: str) -> None:
        """Write into the store, if it can be reached: without rank 0, which keeps it, nobody could listen."""

        def write() -> None:
            with suppress(RuntimeError):
                self.store.set(key, text)

        thread = threading.Thread(target=write, name="rank-watch-word", daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)

    def _say(self, lost: str) -> None:
        if self.said is None:
            self.said = lost
            print(f"[rank {self.rank}] {lost}; the run cannot go on without it.", file=sys.stderr, flush=True)

    def _end(self, lost: str) -> None:
        if "does not answer" in lost and self._ended.wait(GRACE_SECONDS):
            return  # rank 0 had finished, and so have we
        self._tell("lost", lost)
        self._say(lost)
        if self._ended.wait(GRACE_SECONDS):
            return
        for child in self.children:
            child.kill()
        os._exit(1)  # the main thread hangs in a collective, where no exception reaches it
