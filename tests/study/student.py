"""A student that learns a known linear teacher, for probes whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin
from tests.support import toys

WIDTH = 48


class Student(LoRAMixin):
    """Learns a rank-8 teacher from noisy rows (oracle O1 of research/batch_and_capacity.md)."""

    lora = LoRAConfig(rank=16, targets=["layer"])
    learning_rate = 6e-4

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def configure_model(self) -> None:
        torch.manual_seed(self.seed)

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return 0.5 * (self.layer(x) - y).square().sum(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.losses(batch)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(self.learning_rate), betas=(0.9, 0.95))


def loader(count: int, seed: int, batch_size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(99)
    teacher = torch.randn(WIDTH, 8, generator=generator) @ torch.randn(8, WIDTH, generator=generator)
    teacher *= 3 / teacher.norm()
    generator.manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return DataLoader(
        TensorDataset(x, x @ teacher.T + 0.5 * torch.randn(count, WIDTH, generator=generator)), batch_size
    )


def snapshot(tmp_path: Path, seed: int = 0, count: int = 1024) -> tuple[Student, dict[str, Any]]:
    module = Student(seed)
    trainer = toys.trainer(tmp_path)
    trainer.fit(module, loader(count, 1000 + seed))
    return module, trainer.optimizers[0].state_dict()
