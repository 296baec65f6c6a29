"""Lightning's tuner saves and restores the module, and leaves adapters and base unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader

from lightning_lora import lora_layers
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


class Sized(Toy):
    """What the tuner asks of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2
        self.lr = 0.05

    def train_dataloader(self) -> DataLoader[Any]:
        return toys.loader(count=16, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return toys.loader(count=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class CountSteps(Callback):
    def __init__(self) -> None:
        self.first: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step


@pytest.mark.parametrize("tool", ["scale_batch_size", "lr_find"])
def test_the_tuner_leaves_base_adapters_and_step_counter_unchanged(tool: str, tmp_path: Path) -> None:
    module = Sized()
    module.configure_model()
    before, steps = toys.snapshot(module), CountSteps()
    runner = toys.trainer(tmp_path, callbacks=[steps])
    if tool == "scale_batch_size":
        Tuner(runner).scale_batch_size(module, max_trials=2, steps_per_trial=2)
        assert module.batch_size > 2
    else:
        Tuner(runner).lr_find(module, num_training=5)
    assert toys.same(before, toys.snapshot(module))
    assert len(lora_layers(module)) == 2
    runner.fit(module)
    assert steps.first == 0
    assert all(toys.moved(module))
    assert toys.same(toys.base_of(Toy()), toys.base_of(module))
