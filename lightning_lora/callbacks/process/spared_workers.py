"""Data workers that survive the signal that stops their run: its last step needs their batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader


def spare_workers(trainer: Trainer) -> None:
    """Let the data workers of ``trainer`` ignore SIGINT and SIGTERM, unless SIGTERM comes from their own parent.

    Schedulers and terminals send signals to every process of a run. Without this a worker would die of one, and torch
    would end the run with an error. It applies to all loaders that the trainer sets up after the call.
    """
    strategy = trainer.strategy
    if "process_dataloader" in vars(strategy):
        return  # an earlier run did it
    # Lightning passes every loader to this method before the loader has workers.
    process = strategy.process_dataloader

    def spared(dataloader: object) -> object:
        if isinstance(dataloader, DataLoader) and not isinstance(dataloader.worker_init_fn, _SparedWorker):
            # Lightning does this later, but only where the loader has no worker_init_fn.
            _auto_add_worker_init_fn(dataloader, trainer.global_rank)
            dataloader.worker_init_fn = _SparedWorker(dataloader.worker_init_fn)
        return process(dataloader)

    strategy.process_dataloader = spared


class _SparedWorker:
    """A ``worker_init_fn`` for data workers that leave signals to their parent; as a class it can be pickled.

    Args:
        then: The loader's own ``worker_init_fn``, called afterwards.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(signal, "sigwaitinfo"):
            signals = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            threading.Thread(target=_obey_parent, args=(signals,), name="signals", daemon=True).start()
        else:  # macOS and Windows do not tell which process has sent a signal
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def _obey_parent(signals: set[Any]) -> None:
    """End on a SIGTERM from the parent, by which Python ends workers that are left over; it waits for them."""
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
