"""Data workers ignore signals that are meant for the run, and end with their parent."""

from __future__ import annotations

import pickle
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from lightning_lora.callbacks.process.spared_workers import spare_workers
from tests.support import toys

SPARED = ("INT", "TERM")

LEFT_OVER = """
import sys
from lightning_lora.callbacks.process.spared_workers import spare_workers
from tests.support import toys
from torch.utils.data import DataLoader

trainer = toys.trainer(sys.argv[1])
spare_workers(trainer)
loader = trainer.strategy.process_dataloader(DataLoader(toys.rows(), num_workers=1, persistent_workers=True))
next(iter(loader))
"""


class Marked:
    """A loader's own ``worker_init_fn``."""

    def __call__(self, worker: int) -> None:
        info: Any = torch.utils.data.get_worker_info()
        info.dataset.tensors[0][:] = 7


def spared(**options: Any) -> DataLoader[Any]:
    trainer, loader = toys.trainer(Path()), DataLoader(toys.rows(4), num_workers=1, **options)
    for _ in range(2):  # a second run with the same trainer and loader changes nothing
        spare_workers(trainer)
        assert trainer.strategy.process_dataloader(loader) is loader
    return loader


def test_a_worker_does_not_die_of_what_others_send() -> None:
    batches: Any = iter(spared(worker_init_fn=Marked()))
    seen = [next(batches)]
    [worker] = batches._workers
    for name in SPARED:
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    seen += list(batches)
    assert len(seen) == 4
    assert all(bool((x == 7).all()) for x, _ in seen)  # the loader's own function has run
    worker.join(30)
    assert worker.exitcode == 0


def test_a_spared_worker_can_be_spawned() -> None:
    init = pickle.loads(pickle.dumps(spared(worker_init_fn=Marked()).worker_init_fn))
    assert isinstance(init.then, Marked)


def test_lightnings_seeds_of_workers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    init: Any = spared().worker_init_fn
    assert init.then.func is pl_worker_init_function


def test_a_worker_dies_when_its_parent_says_so() -> None:
    batches: Any = iter(spared())
    next(batches)
    [worker] = batches._workers
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_a_program_ends_though_workers_are_left_over(tmp_path: Path) -> None:
    begun = time.monotonic()
    toys.run_python(LEFT_OVER, tmp_path)
    assert time.monotonic() - begun < 60
