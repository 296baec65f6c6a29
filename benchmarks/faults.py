"""What a disturbed run does with our callbacks and without: ``python -m benchmarks.faults``, a table in minutes.

``python -m benchmarks.faults price`` measures what looking at every gradient costs in a training step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import FiniteGradients
from lightning_lora.data import SFTDataModule
from lightning_lora.demo_arm import MODEL, TRAIN
from lightning_lora.tasks import CausalLM
from tests import toys
from tests.integration.test_faults import Run, is_alive, run, train

LIMIT = 90.0


def tell(rank: int, signum: int) -> Callable[[Run], None]:
    """Send a signal to one rank when it has done three steps."""
    return lambda disturbed: os.kill(disturbed.pid(rank), signum)


def tell_all(signum: int) -> Callable[[Run], None]:
    """Send it to every process of the run, as schedulers and terminals do."""

    def disturb(disturbed: Run) -> None:
        disturbed.pid(0)
        os.killpg(disturbed.process.pid, signum)

    return disturb


def worker(disturbed: Run) -> None:
    os.kill(int(disturbed.wait_for(r"step 3 workers \[(\d+), \d+\]")[1]), signal.SIGKILL)


def wait(disturbed: Run) -> None:
    disturbed.pid(0)


CASES: dict[str, tuple[list[str], Callable[[Run], None]]] = {
    "SIGTERM": ([], tell(0, signal.SIGTERM)),
    "SIGINT": ([], tell(0, signal.SIGINT)),
    "SIGTERM to all, 2 data workers": (["--workers=2"], tell_all(signal.SIGTERM)),
    "SIGINT to all, 2 data workers": (["--workers=2"], tell_all(signal.SIGINT)),
    "SIGTERM to rank 0 of 2": (["--strategy=ddp"], tell(0, signal.SIGTERM)),
    "SIGTERM to rank 1 of 2": (["--strategy=ddp"], tell(1, signal.SIGTERM)),
    "SIGTERM to both of 2": (["--strategy=ddp"], tell_all(signal.SIGTERM)),
    "NaN gradient at step 4 of 8": (["--nan-at=3", "--steps=8"], wait),
    "rank 1 of 2 killed": (["--strategy=ddp"], tell(1, signal.SIGKILL)),
    "rank 0 of 2 killed": (["--strategy=ddp"], tell(0, signal.SIGKILL)),
    "rank 1 of 2 hangs": (["--strategy=ddp"], tell(1, signal.SIGSTOP)),
    "data worker killed": (["--workers=2"], worker),
}


def row(name: str, alone: bool) -> str:
    options, disturb = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with run(path, *train(path, *options, *(["--alone"] if alone else []))) as disturbed:
            disturb(disturbed)
            begun = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                disturbed.process.wait(LIMIT)
            while is_alive(disturbed.process.pid) and time.monotonic() < begun + LIMIT:
                time.sleep(0.05)
            took, left = time.monotonic() - begun, is_alive(disturbed.process.pid)
            code, printed = disturbed.process.poll(), disturbed.text.splitlines()
        saved = sorted(file.name for file in path.rglob("*.ckpt"))
        finite = [bool(t.isfinite().all()) for file in path.rglob("*.ckpt") for t in weights(file)]
    told = [line for line in printed if line.strip() and " step " not in line]
    ending = f"still running after {LIMIT:.0f} s" if left else f"ended in {took:.1f} s"
    return f"{ending}; code {code}; saved {saved} finite {all(finite)}; last words: {told[-1][:200] if told else '-'}"


def weights(file: Path) -> list[torch.Tensor]:
    return list(torch.load(file, weights_only=True)["state_dict"].values())


class TimedGradients(FiniteGradients):
    """Keeps the seconds of each look."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[float] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        begun = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.looks.append(time.perf_counter() - begun)


class Clock(Callback):
    """Keeps the seconds of each batch."""

    def __init__(self) -> None:
        self.batches: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append(time.perf_counter() - self.begun)


def price() -> None:
    for name, lora in (("LoRA rank 32", LoRAConfig()), ("full fine-tuning", None)):
        looks, clock = TimedGradients(), Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = toys.trainer(Path(folder), callbacks=[looks, clock], max_steps=30)
            data = SFTDataModule(str(TRAIN), batch_size=8, max_length=256)
            trainer.fit(CausalLM(str(MODEL), lora=lora), datamodule=data)
        look, batch = (statistics.median(values[5:]) for values in (looks.looks, clock.batches))
        print(f"{name}: {look * 1e3:.2f} ms of {batch * 1e3:.1f} ms, {look / batch:.2%}")


def main() -> None:
    if sys.argv[1:] == ["price"]:
        return price()
    for name in CASES:
        for alone in (False, True):
            print(f"{name} | {'Lightning alone' if alone else 'ours'} | {row(name, alone)}", flush=True)


if __name__ == "__main__":
    main()
