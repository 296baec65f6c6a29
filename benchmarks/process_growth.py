"""How much more the memory of a process grows on a CPU than what its training step holds.

    python -m benchmarks.process_growth            # prints the table of docs/understand/plan.md
    python -m benchmarks.process_growth lora full  # some rows

A plan counts what torch holds. The resident memory of the process also has libraries that load on the way and freed
blocks that the C library keeps for later. Each row runs in a process of its own, 20 optimizer steps on rows of changing
lengths, as real data has them; models are those of `benchmarks.memory_prediction`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from benchmarks.memory_prediction import cases, folders
from lightning_lora.callbacks import PlannedRun
from lightning_lora.memory.step_trace import trace_step

NAMES = ("lora", "full", "lora-clip-accumulate", "amp-lora", "checkpointed", "moe-lora", "moe-full")
_STEPS = 20


def run(name: str, models: str) -> None:
    """Train one case in this process, and print its traced bytes and those that the process grew by."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        case = cases({kind: f"{models}/{kind}" for kind in ("llama", "moe", "bert")})[name]
        told = PlannedRun()
        accumulated = case.settings.get("accumulate_grad_batches", 1)
        batch = case.batch()
        length = batch["input_ids"].shape[1]
        # The longest batch comes in the middle, after blocks of other sizes.
        cuts = [length // 2 + (37 * step) % (length // 2) for step in range(_STEPS * accumulated)]
        cuts[len(cuts) // 2] = length
        batches = [{key: tensor[:, :cut].clone() for key, tensor in batch.items()} for cut in cuts]
        trainer = Trainer(
            **case.settings,
            **{"max_steps": _STEPS, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[told],
        )
        trainer.fit(case.module(), DataLoader(cast(Any, batches), batch_size=None))
        # The trace comes last, since it has a peak of its own.
        traced = trace_step(case.module(), batch, **case.settings).memory.total
    print(traced, int(told.measured["peak_bytes"] or 0))


def main(names: list[str]) -> None:
    """Print the table."""
    print("| step | planned, MiB | growth of the process, MiB | growth / planned |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as top:
        with contextlib.redirect_stdout(io.StringIO()):
            folders(Path(top))  # here, for the process that trains must have no earlier peak
        for name in names or NAMES:
            command = [sys.executable, "-m", "benchmarks.process_growth", "--run", name, top]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            planned, grown = (int(number) / 2**20 for number in lines[-1].split())
            print(f"| {name} | {planned:.1f} | {grown:.1f} | {grown / planned:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main(sys.argv[1:])
