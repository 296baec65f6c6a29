"""Runs of a student of a linear teacher whose spectrum is known: flat of rank 8, or a power law (oracle O1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import CapacityMonitor
from tests.study.student import WIDTH, Student
from tests.support import toys

Kind = Literal["flat", "power law"]
BATCH = 32


def teacher(kind: Kind) -> torch.Tensor:
    """A weight of norm 3 with 8 equal singular values, or with singular values ``1 / k``."""
    generator = torch.Generator().manual_seed(99)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    places = torch.arange(1, WIDTH + 1)
    values = (places <= 8).float() if kind == "flat" else 1 / places
    return left @ torch.diag(3 * values / values.norm()) @ right


def rows(kind: Kind, count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(x, x @ teacher(kind).T + 0.5 * torch.randn(count, WIDTH, generator=generator))


class RankedStudent(Student):
    """A student of a chosen rank, whose learning rate falls to zero in ``decay_steps``, or stays (0)."""

    def __init__(self, rank: int, decay_steps: int, seed: int = 0, learning_rate: float = 1e-3) -> None:
        super().__init__(seed)
        self.lora = LoRAConfig(rank=rank, alpha=32, targets=["layer"])
        self.learning_rate, self.decay_steps = learning_rate, decay_steps

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.losses(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.decay_steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def monitored(
    folder: Path, kind: Kind, rank: int, *, decays: bool = True, seed: int = 0, count: int = 16384, **options: Any
) -> CapacityMonitor:
    """Train a student with a `CapacityMonitor`, and return the monitor."""
    monitor = CapacityMonitor()
    module = RankedStudent(rank, count // BATCH if decays else 0, seed)
    train = DataLoader(
        rows(kind, count, 1000 + seed), BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    trainer = toys.trainer(folder, callbacks=[monitor], **options)
    trainer.fit(module, train, DataLoader(rows(kind, 256, 7000 + seed), BATCH))
    return monitor
