"""Runs that keep the rows of a step, on two ranks: ``python target_ranks.py FOLDER``; on one, call `fit`.

Runs on two ranks save inside an accumulation window to ``KIND-2.ckpt`` and go on from ``KIND-1.ckpt``. What was done
goes to ``RANK.pt``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import lora_state_dict
from lightning_lora.callbacks import AdaptiveAccumulation, TargetBatchSize
from tests.integration.scripts import two_processes
from tests.support import toys

NUM_ROWS, STEP, BATCH = 48, 8, 2
SAVED_AT = {"target": {1: 11, 2: 5}, "before": {1: 11, 2: 5}, "after": {1: 15, 2: 7}}
"""Batches, by kind and ranks. With a schedule, before and after it goes from steps of 8 rows, after three, to 4."""


class Data(LightningDataModule):
    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        rows: Any = toys.token_rows(NUM_ROWS)
        assert self.trainer is not None
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return DataLoader(rows, self.batch_size, sampler=DistributedSampler(rows, shuffle=False, **share))


class Watched(two_processes.Toy):
    """Notes the rows of all ranks and the rate of every step; has room for so many rows."""

    room = NUM_ROWS

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.net.double()
        self.steps: list[tuple[int, float]] = []
        self.num_rows = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["labels"]) > self.room:
            raise torch.OutOfMemoryError("no room")
        self.num_rows += len(batch["labels"]) * self.trainer.world_size
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.steps.append((self.num_rows, optimizer.param_groups[0]["lr"]))
        self.num_rows = 0

    def configure_optimizers(self) -> Any:
        # Not Adam, which makes rounding errors in small gradients as large as the gradients.
        optimizer = torch.optim.SGD(self.lora_parameter_groups(1e-2), momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        linear = LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear, "interval": "step"}}


class Save(Callback):
    """Saves within a window."""

    def __init__(self, path: Path, at: int) -> None:
        self.path = path
        self.at = at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.at:
            trainer.save_checkpoint(self.path)


def fit(folder: Path, kind: str, ranks: int, started_on: int | None = None) -> dict[str, Any]:
    """What was done. A run that goes on has the settings of the one that ``started_on`` so many ranks."""
    first = started_on or ranks
    options: dict[str, Any] = {"callbacks": [TargetBatchSize(STEP)]}
    if kind != "target":
        k = STEP // BATCH // first
        options = {"callbacks": [AdaptiveAccumulation({3: k // 2})], "accumulate_grad_batches": k}
    if started_on is None:
        options["callbacks"].append(Save(folder / f"{kind}-{ranks}.ckpt", SAVED_AT[kind][ranks]))
    strategy = "ddp" if ranks > 1 else "auto"
    trainer = toys.trainer(folder, devices=ranks, strategy=strategy, use_distributed_sampler=False, **options)
    module = Watched()
    path = folder / f"{kind}-{first}.ckpt" if started_on else None
    trainer.fit(module, datamodule=Data(), ckpt_path=path, weights_only=True)
    return {"steps": module.steps, "weights": lora_state_dict(module)}


def search(folder: Path, strategy: Any) -> tuple[str, list[str]]:
    """The batch that was found where the second rank has room for 2 rows only, if it was tried; what was said."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lightning.pytorch").addHandler(listener)
    target = TargetBatchSize(STEP)
    trainer = toys.trainer(folder, callbacks=[target], devices=2, strategy=strategy, use_distributed_sampler=False)
    module = Watched()
    if trainer.global_rank == 1 and strategy == "ddp":
        module.room = 2
    trainer.fit(module, datamodule=Data(batch_size=4))
    assert {rows for rows, _ in module.steps} == {STEP}
    logging.getLogger("lightning.pytorch").removeHandler(listener)
    return str(target.batch), said


def main(folder: Path) -> None:
    sharded = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    done: dict[str, Any] = {"ddp": search(folder, "ddp"), "fsdp2": search(folder, sharded)}
    for kind in SAVED_AT:
        done[f"{kind} whole"] = fit(folder, kind, 2)
        done[f"{kind} resumed"] = fit(folder, kind, 2, started_on=1)
    torch.save(done, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
