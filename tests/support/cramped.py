"""A module that runs out of memory beyond a number of rows, and data for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import TargetBatchSize
from tests.support import toys

NUM_ROWS = 52
"""Without the last rows, batches of 8 make 3 steps of 16, and batches of 4 make 4."""


class Data(LightningDataModule):
    def __init__(self, batch_size: Any = 8, **options: Any) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.options: dict[str, Any] = {"shuffle": True} | options

    def train_dataloader(self) -> Any:
        rows: Any = toys.token_rows(NUM_ROWS)
        return DataLoader(rows, self.batch_size, **self.options)


class Cramped(LoRAMixin, TokenWeightedLoss):
    """Has everything that a trial could leave behind, and runs out of memory with more rows than ``room``."""

    lora = LoRAConfig(rank=2, targets=["up"], dropout=0.2)
    room = NUM_ROWS
    automatic = True

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.table, self.up, self.down = nn.Embedding(300, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.sizes: list[int] = []
        self.drawn: list[float] = []
        self.steps: list[int] = []
        self.num_calls = 0
        self.automatic_optimization = self.automatic

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.num_calls += 1
        self.sizes.append(len(batch["labels"]))
        self.drawn += [random.random(), float(torch.rand(()))]
        self.seen += batch["input_ids"].sum()
        mask = batch["labels"] != -100
        errors = self.down(torch.tanh(self.up(self.table(batch["input_ids"])))).squeeze(-1) - batch["input_ids"] / 150
        loss = self.token_loss((errors.square() * mask).sum(), mask.sum())
        if len(mask) > self.room and not isinstance(loss, FakeTensor):  # a trace takes no memory
            raise torch.OutOfMemoryError(f"no room for {len(mask)} rows")
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.steps.append(sum(self.sizes[sum(map(self.per_step, self.steps)) :]))

    def per_step(self, rows: int) -> int:
        return -(-rows // self.sizes[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(1e-2))
        self.planned = self.trainer.estimated_stepping_batches
        self.scheduler = LambdaLR(optimizer, lambda step: 1 - step / self.planned)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def fit(folder: Path, target: TargetBatchSize | None, module: Cramped, data: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)
    own: list[Callback] = [target] if target else []
    trainer = toys.trainer(folder, **({"callbacks": own} | options))
    trainer.fit(module, **source(Data() if data is None else data))
    return trainer


def source(data: Any) -> dict[str, Any]:
    return {"datamodule" if isinstance(data, Data) else "train_dataloaders": data}
