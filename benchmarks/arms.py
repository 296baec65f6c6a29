"""Arms side by side against separate runs: seconds of an optimizer step, and peak memory, for 1, 2 and 4 arms.

    python -m benchmarks.arms [--rows 1 8] [--tokens 128] [--steps 12] [--repeats 5]

Times: all ways in one process, one after the other, again and again, so that whatever disturbs one disturbs all; the
fastest repetition counts. A step is that of all arms together. On a CPU it is processor time, to which others that use
the machine add little. Memory: each way in a process of its own, which is
forked before anything is loaded; what separate runs take at the same time is that of one, times their number.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import load, machine
from lightning_lora import LoRAConfig
from lightning_lora.cli.embedded import MODEL
from lightning_lora.memory.process_peak import peak_bytes
from lightning_lora.study.bank.bank import ArmBank, ArmRun
from lightning_lora.tasks import CausalLM

RANKS = (8, 16, 4, 32)
WAYS = ("separate", "turns", "rows")


class Tokens(LightningDataModule):
    """Rows of random tokens, all of one length."""

    def __init__(self, rows: int, tokens: int, steps: int) -> None:
        super().__init__()
        self.rows, self.tokens, self.steps = rows, tokens, steps

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(5, 2000, (self.rows * self.steps, self.tokens), generator=torch.Generator().manual_seed(0))
        return DataLoader([*ids], self.rows, collate_fn=self.collate)  # type: ignore[arg-type]

    @staticmethod
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Clock(Callback):
    """Remembers when each optimizer step was done."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() if torch.cuda.is_available() else time.process_time())


def train(way: str, num_arms: int, data: tuple[int, int, int]) -> float:
    """Train arms; returns seconds of a step of all of them, without loading and without the first two steps."""
    clocks: list[list[float]] = [[] for _ in range(num_arms)]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    made = {
        f"rank {rank}": ArmRun(
            Trainer(max_epochs=1, devices=1, logger=False, callbacks=[Clock(times)], gradient_clip_val=1.0, **quiet),
            CausalLM(str(MODEL), 1e-4, LoRAConfig(rank=rank), dtype="float32"),
            Tokens(*data),
            seed=rank,
        )
        for rank, times in zip(RANKS, clocks, strict=False)
    }
    if way == "separate":
        for run in made.values():
            run.trainer.fit(run.module, run.data)
        return sum((times[-1] - times[1]) / (len(times) - 2) for times in clocks)
    bank = ArmBank("rows" if way == "rows" else "turns")
    if failed := bank.fit(made):
        raise RuntimeError(f"arms failed: {failed}")
    assert not bank.remark, bank.remark
    return (max(times[-1] for times in clocks) - max(times[1] for times in clocks)) / (len(clocks[0]) - 2)


def peak(train_it: Callable[[], Any]) -> int:
    """Peak of resident memory that a training adds to a process, bytes; of allocated memory on a GPU."""
    parent, child = multiprocessing.get_context("fork").Pipe()

    def measure() -> None:
        quieten()
        cpu = torch.device("cpu")
        before = peak_bytes(cpu) or 0
        train_it()
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
        child.send(on_gpu or (peak_bytes(cpu) or 0) - before)

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    process.join()
    return parent.recv()


def quieten() -> None:
    """Leave out what is said of each run."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    os.chdir(tempfile.mkdtemp())
    counts, began = (1, 2, 4), load()
    memory = {}
    for rows in given.rows:
        data = rows, given.tokens, given.steps
        for count in counts:
            for way in WAYS[1:] if count > 1 else WAYS[:1]:
                memory[rows, count, way] = peak(lambda w=way, c=count, d=data: train(w, c, d))
    quieten()
    seconds: dict[tuple[int, int, str], list[float]] = {}
    for _ in range(given.repeats):
        for rows in given.rows:
            for count in counts:
                for way in WAYS:
                    seconds.setdefault((rows, count, way), []).append(
                        train(way, count, (rows, given.tokens, given.steps))
                    )
    found = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"\n{found.get('gpu') or found['cpu']}, {found['threads']} thread(s), load {began} before, {load()} after")
    print(f"base {Path(MODEL).name}, float32, ranks {RANKS}, {given.tokens} tokens a row\n")
    print("| rows of an arm | arms | ms a step, separate | turns | rows | MiB, separate at once | turns | rows |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in given.rows:
        one = memory[rows, 1, "separate"]
        for count in counts:
            times = [f"{min(seconds[rows, count, way]) * 1e3:.0f}" for way in WAYS]
            sizes = [count * one, *(memory.get((rows, count, way), one) for way in WAYS[1:])]
            print(f"| {rows} | {count} | {' | '.join(times)} | {' | '.join(f'{s / 2**20:.0f}' for s in sizes)} |")


if __name__ == "__main__":
    main()
