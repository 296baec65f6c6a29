"""A module that learns a linear teacher of rank 4, in full or by adapters, and its data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin

WIDTH = 12


class Learner(LoRAMixin):
    """Its rate is that of full fine-tuning; adapters get `lr_multiplier` times it."""

    def __init__(self, learning_rate: float, lora: LoRAConfig | None = None) -> None:
        super().__init__()
        self.lora = lora
        self.learning_rate = learning_rate
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.layer(x) - y).square().mean(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.losses(batch).mean(), batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.losses(batch)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(self.learning_rate), weight_decay=0.0)


class Rows(LightningDataModule):
    """Noisy rows of the teacher; the loader shuffles by the global random numbers, as those of most users do."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    @staticmethod
    def rows(count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(99)
        teacher = torch.randn(WIDTH, 4, generator=generator) @ torch.randn(4, WIDTH, generator=generator) / 4
        generator.manual_seed(seed)
        x = torch.randn(count, WIDTH, generator=generator)
        return TensorDataset(x, x @ teacher.T + 0.3 * torch.randn(count, WIDTH, generator=generator))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows(192, 1), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows(48, 2), 48)
