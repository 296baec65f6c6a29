"""What a disturbed run does with our callbacks and without: ``python -m benchmarks.faults`` prints the table of docs.

``python -m benchmarks.faults "rank 1 of 2 killed"`` prints that row of it, ``python -m benchmarks.faults price`` what
looking at every gradient costs in a training step.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.machine import QUIET, disturbed, load, machine
from benchmarks.timing import spread
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import FiniteGradients
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from tests.integration.scripts.disturbed import Run, run, training

LIMIT = 60.0
"""Seconds after which a run counts as hanging."""

WORKERS, RANKS = ["--workers=2"], ["--strategy=ddp"]
NEVER = "--keep-every=1000000"
EVERY = "--keep-every=1"


def kill(rank: int, signum: int) -> Callable[[Run], None]:
    """Send a signal to the process of one rank, when it has done some steps."""
    return lambda told: os.kill(told.pid(rank), signum)


def kill_all(signum: int) -> Callable[[Run], None]:
    """Send it to every process of the run."""

    def disturb(told: Run) -> None:
        told.pid(0)
        told.tell_all(signum)

    return disturb


def wait(told: Run) -> None:
    """The disturbance is in the run."""
    told.wait_for("begins batch 3")


CASES: dict[str, tuple[list[str], Callable[[Run], None]]] = {
    "SIGTERM": ([NEVER], kill(0, signal.SIGTERM)),
    "Ctrl-C": ([NEVER], kill(0, signal.SIGINT)),
    "SIGTERM to all, 2 data workers": ([NEVER, *WORKERS], kill_all(signal.SIGTERM)),
    "Ctrl-C to all, 2 data workers": ([NEVER, *WORKERS], kill_all(signal.SIGINT)),
    "SIGTERM to rank 0 of 2": ([NEVER, *RANKS], kill(0, signal.SIGTERM)),
    "SIGTERM to rank 1 of 2": ([NEVER, *RANKS], kill(1, signal.SIGTERM)),
    "SIGTERM to both ranks": ([NEVER, *RANKS], kill_all(signal.SIGTERM)),
    "NaN gradient in step 4 of 8": ([EVERY, "--nan-at=3", "--steps=8"], wait),
    "rank 1 of 2 killed": ([EVERY, *RANKS], kill(1, signal.SIGKILL)),
    "rank 0 of 2 killed": ([EVERY, *RANKS], kill(0, signal.SIGKILL)),
    "rank 1 of 2 hangs": ([EVERY, *RANKS], kill(1, signal.SIGSTOP)),
    "data worker killed": ([EVERY, *WORKERS], lambda told: os.kill(told.worker(), signal.SIGKILL)),
}


def outcome(name: str, *more: str) -> str:
    """How a run ends that is disturbed, and what is left of it."""
    options, disturb = CASES[name]
    with tempfile.TemporaryDirectory() as folder, run(Path(folder), *training(Path(folder), *options, *more)) as told:
        disturb(told)
        begun = time.monotonic()
        while told.is_alive and time.monotonic() < begun + LIMIT:
            time.sleep(0.05)
        took = time.monotonic() - begun
        ending = f"hangs after {LIMIT:.0f} s" if told.is_alive else f"code {told.process.wait()} in {took:.0f} s"
        return f"{ending}, {_saved(Path(folder))} of {max(told.steps)} steps saved"


def _saved(folder: Path) -> str:
    newest, finite = 0, True
    for path in folder.rglob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        newest = max(newest, checkpoint["global_step"])
        finite &= all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())
    return str(newest) if finite else f"{newest} (NaN)"


class Timed(FiniteGradients):
    """Keeps the seconds of each step and of the look at its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.looks: list[float] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.begun = _now()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        begun = _now()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.looks.append(_now() - begun)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(_now() - self.begun)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def price(name: str, lora: LoRAConfig | None, steps: int = 60) -> str:
    """What a look costs in a training step of the embedded model, after ten steps to warm up."""
    timed = Timed()
    trainer = Trainer(callbacks=[timed], max_steps=steps, max_epochs=-1, **QUIET)
    data = SFTDataModule(str(TRAIN), batch_size=8, max_length=128)
    trainer.fit(CausalLM(str(MODEL), lora=lora), datamodule=data)
    look, step = spread(timed.looks[10:]), spread(timed.steps[10:])
    tenths = f"{look.p10 * 1e3:.2f} to {look.p90 * 1e3:.2f}"
    return f"{name}: a look takes {look.median * 1e3:.2f} ms ({tenths}) of a step of {step.median * 1e3:.0f} ms"


def main() -> None:
    before = load()
    print(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if sys.argv[1:] == ["price"]:
        print(price("LoRA rank 32", LoRAConfig()))
        print(price("full fine-tuning", None))
    else:
        print("| disturbance | with our callbacks | Lightning alone |\n|---|---|---|")
        for name in sys.argv[1:] or CASES:
            print(f"| {name} | {outcome(name)} | {outcome(name, '--alone')} |", flush=True)
    print(f"others used the machine meanwhile: {disturbed(before, load())}")


if __name__ == "__main__":
    main()
