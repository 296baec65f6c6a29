"""The baseline itself (T9): the same module without adapters on one device and under FSDP2 in two processes.

    PYTHONPATH=. python studies/full_baseline.py

Five steps of 32 rows: two processes take 16 each. Larger: ``--steps``; on GPUs ``--accelerator cuda``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_lora.sharding import FSDP2Strategy, shard_lora
from studies.modules.pages import FINDINGS, made_with, markdown_table, write_lines
from studies.modules.rows import rows_of
from studies.modules.task import TinyRows, TinyTask

ROWS, RATE = 32, 1e-3


class Sharded(TinyTask):
    """The task, which shards itself where the strategy asks for that."""

    @override
    def configure_model(self) -> None:
        """Shard after the injection, which does nothing here."""
        self.apply_lora()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_lora(self.gpt, self.device_mesh)  # pyright: ignore[reportArgumentType]

    @override
    def train_dataloader(self) -> Any:
        """Rows in order, dealt out to the processes; a sampler of Lightning's would shuffle them."""
        rows, trainer = TinyRows(rows_of("text", "new", ROWS * 100)), self.trainer
        sampler = DistributedSampler(rows, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(rows, ROWS // trainer.world_size, sampler=sampler)


class Trace(Callback):
    """The loss of each step over all processes, and the bytes that this process holds at the end.

    Attributes:
        losses: Loss of each step.
        held: Bytes of weights, gradients and optimizer state.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held: dict[str, int] = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the mean over processes."""
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)
        # Gradients stay until the next step, and the weights are sharded again.
        weights = [each for each in pl_module.parameters() if each.requires_grad]
        (optimizer,) = trainer.optimizers
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        self.held = {
            "weights": sum(map(_bytes, weights)),
            "gradients": sum(_bytes(each.grad) for each in weights if each.grad is not None),
            "optimizer state": sum(map(_bytes, states)),
        }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def run(processes: int, steps: int, accelerator: str) -> tuple[Trace, int]:
    """Train, and return what was seen and the number of weights."""
    trace = Trace()
    module = Sharded(learning_rate=RATE)
    trainer = Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy=FSDP2Strategy(process_group_backend="gloo" if accelerator == "cpu" else None)
        if processes > 1
        else "auto",
        max_steps=steps,
        callbacks=[trace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = sum(each.numel() for each in module.parameters())
    trainer.fit(module)
    return trace, size


def main() -> None:
    """Measure, print the tables and write the CSV; the second process only takes part in the second run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", type=Path, default=FINDINGS / "full_baseline")
    options = parser.parse_args()
    start = time.perf_counter()
    is_first = "LOCAL_RANK" not in os.environ  # Lightning starts this script once more as the second process
    one, size = run(1, options.steps, options.accelerator) if is_first else (Trace(), 0)
    two, _ = run(2, options.steps, options.accelerator)
    if not is_first:
        return
    lines: list[dict[str, object]] = [
        {
            "what": f"loss of step {step}",
            "one device": ours,
            "each of two processes": theirs,
            "difference": theirs - ours,
        }
        for step, (ours, theirs) in enumerate(zip(one.losses, two.losses, strict=True), 1)
    ]
    expected = {"weights": 4 * size, "gradients": 4 * size, "optimizer state": 8 * size}
    lines += (
        {
            "what": f"bytes of {what}, {count:,} by formula".replace(",", ""),
            "one device": one.held[what],
            "each of two processes": two.held[what],
            "difference": two.held[what] - count / 2,
        }
        for what, count in expected.items()
    )
    write_lines(options.out / "results.csv", lines)
    rows = [[f"{each:.9g}" if isinstance(each, float) else each for each in line.values()] for line in lines]
    print(markdown_table(tuple(lines[0]), rows), made_with(time.perf_counter() - start), sep="\n\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
