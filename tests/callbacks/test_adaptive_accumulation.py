"""Accumulation changes without a stale gradient, a lost micro-batch, or a schedule that ends early or late (V12)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader

from lightning_lora.accumulation import may_switch
from lightning_lora.callbacks import AdaptiveAccumulation, BatchSizeMonitor
from lightning_lora.errors import ConfigError
from tests import toys

pytestmark = toys.expected_warnings


class Ones(LightningModule):
    """Every micro-batch has a gradient of 1, so a step shows the number of micro-batches it was made of."""

    kind: Any = LambdaLR

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.steps: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * 1.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.weight.grad is not None
        self.steps.append(round(float(self.weight.grad) * self.trainer.accumulate_grad_batches, 9))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([self.weight], lr=1.0, betas=(0.9, 0.99))
        total = self.trainer.estimated_stepping_batches
        self.scheduler = (
            LambdaLR(optimizer, lambda step: 1 - step / total) if self.kind is LambdaLR else StepLR(optimizer, 1)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def fit(tmp_path: Path, callbacks: list[Callback], start: int, module: Ones | None = None, **options: Any) -> Ones:
    module = module or Ones()
    options = {"accumulate_grad_batches": start, "callbacks": callbacks} | options
    toys.trainer(tmp_path, **options).fit(module, DataLoader(torch.zeros(options.pop("rows", 96), 1)))  # pyright: ignore[reportArgumentType]
    return module


PAIRS = [(old, new) for old, new in itertools.product(range(1, 9), repeat=2) if old != new]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_every_change_at_every_step_keeps_windows_whole(old: int, new: int, tmp_path: Path) -> None:
    for step in range(0, 96 // old, 7):
        module = fit(tmp_path, [AdaptiveAccumulation({step: new})], old)
        assert sum(module.steps) == 96
        changed = next((place for place, size in enumerate(module.steps) if size != old), len(module.steps))
        # Old windows, then new ones, then what is left of the epoch.
        assert all(size == new for size in module.steps[changed:-1])
        assert changed >= step or new == old
        assert changed * old <= math.lcm(old, new) * (step * old // math.lcm(old, new) + 1) or changed == len(
            module.steps
        )
        assert float(module.scheduler.last_epoch) == pytest.approx(math.ceil(96 / old))


def test_a_change_in_the_wrong_place_would_reuse_gradients(tmp_path: Path) -> None:
    """The oracle of the tests above can fail: 4 -> 3 before batch 4 shows 4 + 2 micro-batches in a step."""
    assert not may_switch(4, 4, 3)

    class Wrong(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 4:
                trainer.accumulate_grad_batches = 3

    assert fit(tmp_path, [Wrong()], 4, accumulate_grad_batches=4).steps[1] > 4


def test_rates_and_decays_follow_the_batch(tmp_path: Path) -> None:
    module = Ones()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=4, callbacks=[AdaptiveAccumulation({6: 2})])
    trainer.fit(module, DataLoader(torch.zeros(48, 1)))  # pyright: ignore[reportArgumentType]
    (group,) = trainer.optimizers[0].param_groups
    assert group["betas"] == (0.9, pytest.approx(0.99**0.5))
    # 12 steps were planned; after 6 the rest is walked through in 12 halves.
    expected = [1 - step / 12 for step in range(6)]
    expected += [(1 - (6 + step / 2) / 12) / math.sqrt(2) for step in range(12)]
    # The first rate after the change was set by the scheduler's step before it.
    assert module.rates == pytest.approx(expected)


@pytest.mark.parametrize("max_steps", [20])
def test_a_run_of_so_many_steps_keeps_its_schedule(max_steps: int, tmp_path: Path) -> None:
    module = fit(tmp_path, [AdaptiveAccumulation({6: 2}, lr_rule="none")], 4, max_steps=max_steps, max_epochs=-1)
    assert module.rates == pytest.approx([1 - step / max_steps for step in range(max_steps)])


def test_refusals(tmp_path: Path) -> None:
    class Steps(Ones):
        kind = StepLR

    cases: list[tuple[list[Callback], Any, str]] = [
        ([AdaptiveAccumulation()], Ones(), "needs a BatchSizeMonitor with a calibration"),
        ([AdaptiveAccumulation(), BatchSizeMonitor()], Ones(), "needs a BatchSizeMonitor with a calibration"),
        ([AdaptiveAccumulation({0: 2}), GradientAccumulationScheduler({0: 1})], Ones(), "keep one of the two"),
        ([AdaptiveAccumulation({0: 2})], Steps(), "StepLR cannot be stretched"),
    ]
    for callbacks, module, message in cases:
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path, callbacks, 1, module)


@pytest.mark.parametrize("options", [{"schedule": {}}, {"schedule": {0: 0}}, {"lr_rule": "linear"}, {"cooldown": 2}])
def test_settings_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdaptiveAccumulation(**options)
