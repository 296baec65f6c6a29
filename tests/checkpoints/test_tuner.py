"""Lightning's tuner saves and restores the module, and leaves adapters and base unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader

from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import CheckpointGuard, FiniteGradients, LoRA, LoRAGuard, TargetBatchSize
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings


class SizedPlain(Plain):
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


class Sized(LoRAMixin, SizedPlain):
    lora = LoRAConfig(rank=2)


class CountSteps(Callback):
    def __init__(self) -> None:
        self.first: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step


@pytest.mark.slow
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


def run(kind: str, tool: str, folder: Path) -> dict[str, torch.Tensor]:
    """Train with two batches of 4 rows to a step, a size that is found or set; returns the weights at the end."""
    torch.manual_seed(0)
    module = SizedPlain() if kind == "callback" else Sized()
    callbacks: list[Callback] = [LoRAGuard(), CheckpointGuard(), FiniteGradients()]
    callbacks = [*([LoRA(LoRAConfig(rank=2))] if kind == "callback" else []), *callbacks]
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2}
    search: dict[str, Any] = {"max_trials": 2, "steps_per_trial": 2}
    if tool == "tuner":
        Tuner(toys.trainer(folder, callbacks=callbacks, **options)).scale_batch_size(module, **search)
    elif tool == "none":
        module.batch_size = 4
    callbacks += [BatchSizeFinder(**search)] if tool == "callback" else []
    runner = toys.trainer(folder, callbacks=callbacks, **options)
    runner.fit(module)
    assert (module.batch_size, runner.global_step) == (4, 4)
    return toys.snapshot(module)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["tuner", "callback"])
@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_a_run_after_a_search_for_the_batch_size_is_one_that_had_it_set(kind: str, tool: str, tmp_path: Path) -> None:
    assert toys.same(run(kind, tool, tmp_path), run(kind, "none", tmp_path))


def test_two_that_choose_the_batch_size_are_refused(tmp_path: Path) -> None:
    runner = toys.trainer(tmp_path, callbacks=[TargetBatchSize(8), BatchSizeFinder()])
    with pytest.raises(ConfigError, match="BatchSizeFinder and target_batch_size both choose batch_size"):
        runner.fit(Sized())
