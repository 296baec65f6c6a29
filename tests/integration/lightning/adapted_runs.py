"""A short adapted run, by the mixin or by the callback, with any option of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_lora import LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys

CONFIG = LoRAConfig(rank=2)
WAYS = ("mixin", "callback")


class Student(toys.Plain):
    """Also predicts, and logs what callbacks watch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def train_dataloader(self) -> Any:
        return toys.loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class AdaptedStudent(LoRAMixin, Student):
    lora = CONFIG


class Look(Callback):
    """Copies the base as training begins, when precision has given it its type."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.base = toys.base_of(pl_module)


def student(way: str) -> tuple[Student, list[Callback]]:
    """A module, and the callback that adapts it unless it has the mixin."""
    return (AdaptedStudent(), []) if way == "mixin" else (Student(), [LoRA(CONFIG)])


def fit(way: str, folder: Path, *callbacks: Callback, module: Any = None, **options: Any) -> Trainer:
    """Train, and check that every adapter has moved and the base has not; `LoRAGuard` looks on."""
    own, first = student(way)
    module = own if module is None else module
    look = Look()
    trainer = toys.trainer(folder, callbacks=[*first, *callbacks, LoRAGuard(), look], **options)
    trainer.fit(module)
    assert len(lora_layers(module)) == sum(isinstance(child, nn.Linear) for child in module.modules()) > 0
    assert all(toys.moved(module))
    assert toys.same(
        look.base, {name: tensor.to(look.base[name].dtype) for name, tensor in toys.base_of(module).items()}
    )
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    return trainer
