"""A slow training run for tests that disturb it: ``python faulty.py FOLDER [--strategy ddp] [--alone] ...``.

Every process prints ``rank R pid P begins batch B`` and ``rank R step S workers [...]``. ``--alone`` leaves our
callbacks out: what Lightning does.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import CheckpointGuard, FiniteGradients, GracefulStop, MemoryAdvice, RankWatch, RunLock
from lightning_lora.callbacks.process import rank_watch
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.sharding import shard_lora
from tests.support import toys
from tests.support.toys import Plain


class Slow(LoRAMixin, Plain):
    """Takes its time, and may find a NaN in the part of a gradient that the last rank holds."""

    lora = LoRAConfig(rank=2)

    def __init__(self, seconds: float, nan_at: int | None) -> None:
        super().__init__()
        self.seconds, self.nan_at = seconds, nan_at

    def configure_model(self) -> None:
        torch.manual_seed(1)
        self.apply_lora()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self.net, self.device_mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx == self.nan_at and self.trainer.global_rank == self.last_rank:
            gradient = self.get_parameter("net.first.lora_A").grad
            assert gradient is not None
            held = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            held.view(-1)[0] = torch.nan

    @property
    def last_rank(self) -> int:
        return self.trainer.world_size - 1


class Report(Callback):
    """Says how far each process is, and which processes make its batches; lets the first take its time to end."""

    def __init__(self, linger: float) -> None:
        self.linger = linger

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            time.sleep(self.linger)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        print(f"rank {trainer.global_rank} pid {os.getpid()} begins batch {batch_idx}", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        iterator = getattr(trainer.fit_loop._combined_loader, "_iterator", None)
        loader = iterator.iterators[0] if iterator is not None else None
        workers = [worker.pid for worker in getattr(loader, "_workers", [])]
        print(f"rank {trainer.global_rank} step {trainer.global_step} workers {workers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="auto", choices=("auto", "ddp", "fsdp2"))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--timeout", type=float, default=30)
    parser.add_argument(
        "--grace", type=float, default=rank_watch.GRACE_SECONDS, help="seconds for an own error to come"
    )
    parser.add_argument("--keep-every", type=int, default=1, help="steps from one checkpoint to the next")
    parser.add_argument("--linger", type=float, default=0, help="seconds that the first process takes to end")
    parser.add_argument("--nan-at", type=int)
    parser.add_argument("--resume", help="a checkpoint, or last")
    options = parser.parse_args()
    rank_watch.GRACE_SECONDS = options.grace
    sharded = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    ours = [RunLock(), RankWatch(options.timeout), GracefulStop(), FiniteGradients(), MemoryAdvice(), CheckpointGuard()]
    keep = ModelCheckpoint(
        options.folder / "checkpoints", "kept", every_n_train_steps=options.keep_every, save_last=True
    )
    theirs = [Report(options.linger), keep]
    trainer = toys.trainer(
        options.folder,
        devices=1 if options.strategy == "auto" else 2,
        strategy=sharded if options.strategy == "fsdp2" else options.strategy,
        callbacks=[*theirs, *([] if options.alone else ours)],
        enable_checkpointing=True,
        max_epochs=-1,
        max_steps=options.steps,
    )
    loader = DataLoader(toys.rows(512), batch_size=2, num_workers=options.workers)
    trainer.fit(Slow(options.seconds, options.nan_at), loader, ckpt_path=options.resume, weights_only=True)


if __name__ == "__main__":
    for line in toys.EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=line.split(":")[1])
    main()
