"""Ends the processes of a run when one of them is lost, and names the lost rank."""

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

from lightning_lora.errors import CallbackSettingError, check_arguments, first_line

CHECK_SECONDS = 1.0  # between two checks of processes on this host
NUM_BEATS = 8  # heartbeats within the timeout
GRACE_SECONDS = 10.0  # for the main thread to end with its own error, which tells more
STORE_SECONDS = 2.0  # to wait for the store when a process ends

_WATCH_NUMBERS = itertools.count()


class RankWatch(Callback):
    """Ends a run of several processes when one of them is lost, and names it; on one process it does nothing.

    A lost process leaves the others waiting in a collective: under gloo until the connection breaks, under NCCL for up
    to half an hour. A thread beside the training notices the loss within seconds if the process is on the same host,
    otherwise by missing heartbeats. It prints which rank was lost, gives the main thread 10 seconds to end with its own
    error, and then ends this process with code 1. A busy process still sends heartbeats; a stopped one (SIGSTOP) counts
    as lost.

    Args:
        timeout: Seconds without a heartbeat after which a rank on another host counts as lost, at least 5.

    Raises:
        ConfigError: If ``timeout`` is less than 5.
    """

    def __init__(self, timeout: float = 30.0) -> None:
        check_arguments(RankWatch, locals(), CallbackSettingError)
        if timeout < 5:
            raise CallbackSettingError(f"timeout must be at least 5 seconds, got {timeout}.")
        self.timeout = timeout
        self._watch: _Watch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the watch, now that the process group exists."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized() and self._watch is None:
            self._watch = _Watch(trainer, self.timeout)
            self._watch.start()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks why this process ends, and the user if the loss of another rank is the reason."""
        if self._watch is not None:
            if isinstance(exception, Exception):
                self._watch.explain(exception)
            self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the watch."""
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


class _Watch(threading.Thread):
    """Sends heartbeats of this rank and checks those of others: rank 0 checks all, other ranks check rank 0."""

    def __init__(self, trainer: Trainer, timeout: float) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.rank, self.local_rank, self.timeout = trainer.global_rank, trainer.local_rank, timeout
        # A connection of its own, which the main thread cannot block, and keys that no earlier watch has used.
        store: Any = _get_default_store()
        self.store = dist.PrefixStore(f"lightning_lora.rank_watch.{next(_WATCH_NUMBERS)}", store.clone())
        self.children: list[subprocess.Popen[Any]] = list(getattr(trainer.strategy.launcher, "procs", []))
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
        self.parent = os.getppid() if is_child else None
        others = range(1, trainer.world_size) if self.rank == 0 else (0,)
        # The last heartbeat of each rank, and the number of own heartbeats when it came. Own heartbeats measure the
        # time: a run that was suspended as a whole has not sent any meanwhile.
        self.last_beats = {other: (b"", 0) for other in others}
        self.printed = False
        self._ended = threading.Event()
        self._found: str | None = None
        self._unanswered = 0.0  # seconds since the store of rank 0 answered
        self._beating = threading.Thread(target=self._beat, name="rank-watch-beats", daemon=True)

    @override
    def start(self) -> None:
        super().start()
        self._beating.start()

    @override
    def run(self) -> None:
        while not self._ended.wait(CHECK_SECONDS):
            self._unanswered += CHECK_SECONDS
            lost = self._lost_on_this_host() or self._found
            if lost is None and 0 in self.last_beats and self._unanswered > self.timeout:
                lost = f"rank 0 does not answer for {self._unanswered:.0f} s"
            if lost is not None:
                self._end(lost)
                return

    def stop(self) -> None:
        """End the threads, and tell the other ranks that this one has left in order."""
        self._ended.set()
        self._publish(f"left/{self.rank}", "in order")
        for thread in (self, self._beating):
            thread.join(STORE_SECONDS)

    def explain(self, exception: Exception) -> None:
        """Tell the other ranks the error that ends this one, and the user which lost rank has caused it."""
        self._ended.set()
        self._publish("lost", f"rank {self.rank} ended by {type(exception).__name__}: {str(exception)[:500]}")
        deadline = time.monotonic() + CHECK_SECONDS  # the system takes a moment to report the end of a process
        lost = self._lost_on_this_host()
        while lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
            lost = self._lost_on_this_host()
        if lost is not None:
            self._print(lost)

    def _lost_on_this_host(self) -> str | None:
        """A sentence about a lost process on this host, or None."""
        for number, child in enumerate(self.children, start=1):
            if code := child.poll():
                by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                return f"rank {self.rank + number} (process {child.pid}) {by}"
        if self.parent is not None and os.getppid() != self.parent:
            return f"rank {self.rank - self.local_rank} (process {self.parent}) is gone"
        return None

    def _beat(self) -> None:
        """Exchange heartbeats, in a separate thread: the store blocks if the machine of rank 0 does not answer."""
        beats = 0
        while not self._ended.is_set():
            beats += 1
            try:
                self._found = self._found or self._lost_by_heartbeats(beats)
            except RuntimeError as error:  # raised by torch's store
                if 0 in self.last_beats:
                    self._found = f"rank 0 does not answer ({first_line(error)})"
                return
            self._unanswered = 0.0
            self._ended.wait(self.timeout / NUM_BEATS)

    def _lost_by_heartbeats(self, beats: int) -> str | None:
        """Send a heartbeat and check the others; a sentence about a lost rank, or None."""
        self.store.set(f"beat/{self.rank}", str(beats))
        if self.store.check(["lost"]):
            return self.store.get("lost").decode()
        for other, (last, when) in list(self.last_beats.items()):
            if self.store.check([f"left/{other}"]):
                del self.last_beats[other]
                continue
            beat = self.store.get(f"beat/{other}") if self.store.check([f"beat/{other}"]) else b""
            if beat != last:
                self.last_beats[other] = (beat, beats)
            elif last and beats - when > NUM_BEATS:
                return f"rank {other} gave no sign of life for {self.timeout:.0f} s"
        return None

    def _publish(self, key: str, text: str) -> None:
        """Write into the store of rank 0 if it can be reached."""

        def write() -> None:
            with suppress(RuntimeError):
                self.store.set(key, text)

        thread = threading.Thread(target=write, name="rank-watch-publish", daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)

    def _print(self, lost: str) -> None:
        if not self.printed:
            self.printed = True
            print(f"[rank {self.rank}] {lost}; the run cannot go on without it.", file=sys.stderr, flush=True)

    def _end(self, lost: str) -> None:
        if "does not answer" in lost and self._ended.wait(GRACE_SECONDS):
            return  # rank 0 has finished, and so has this rank
        self._publish("lost", lost)
        self._print(lost)
        if self._ended.wait(GRACE_SECONDS):
            return
        for child in self.children:
            child.kill()
        os._exit(1)  # the main thread hangs in a collective, where no exception reaches it
