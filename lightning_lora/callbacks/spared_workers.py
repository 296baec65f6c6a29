"""Data workers that outlive the signal by which their run is told to stop: its last step needs their batches."""

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
    """Let workers of all loaders that ``trainer`` takes from now on leave the answer to signals to their parent.

    Schedulers and terminals signal every process of a run, and torch ends a run whose worker dies by an error.
    """
    strategy = trainer.strategy
    if "process_dataloader" in vars(strategy):
        return  # by an earlier run
    # Every loader passes here before it has workers.
    process = strategy.process_dataloader

    def spared(dataloader: object) -> object:
        if isinstance(dataloader, DataLoader) and not isinstance(dataloader.worker_init_fn, _SparedWorker):
            _auto_add_worker_init_fn(dataloader, trainer.global_rank)  # which Lightning does later, where there is none
            dataloader.worker_init_fn = _SparedWorker(dataloader.worker_init_fn)
        return process(dataloader)

    strategy.process_dataloader = spared


class _SparedWorker:
    """A ``worker_init_fn``; a class, so that it reaches workers that are spawned.

    Args:
        then: The loader's own ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(signal, "sigwaitinfo"):
            signals = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            threading.Thread(target=_obey_parent, args=(signals,), name="signals", daemon=True).start()
        else:  # macOS and Windows do not tell who sends a signal
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def _obey_parent(signals: set[Any]) -> None:
    """End by SIGTERM of the parent only: Python ends workers that are left over so, and waits for them."""
    while True:
        told = signal.sigwaitinfo(signals)
        if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
            os._exit(0)
