from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.tasks import CausalLM
from tests.support import toys

LORA = LoRAConfig(rank=2)


def token_loader(batch_size: int = 2, count: int = 8) -> Any:
    return DataLoader(toys.token_rows(count), batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def make(folder: Path, **options: Any) -> CausalLM:
    return CausalLM(str(folder), **({"learning_rate": 2e-3, "lora": LORA} | options))


def fit(module: LightningModule, folder: Path, **options: Any) -> Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    validation = options.pop("validation", None)
    runner = toys.trainer(folder, **options)
    runner.fit(module, token_loader(), validation, ckpt_path=ckpt_path, weights_only=True)
    return runner


class StopAfterEpoch(Callback):
    """Ends the run after its first epoch, as an interruption would."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class Record(Callback):
    """Copies the base at the start of a fit and records the learning rates of every step."""

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}
        self.rates: list[tuple[float, ...]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.base = toys.base_of(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))
