"""Schedules by the epoch keep the factor by which a change of accumulation has multiplied the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_lora.callbacks import AdaptiveAccumulation
from tests.support import toys

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")]

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 - epoch / 8),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 2),
    "polynomial": lambda optimizer: PolynomialLR(optimizer, 5),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 1e-2, 5),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 1e-3, 1e-2, 2, cycle_momentum=False),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
    "chain": lambda optimizer: ChainedScheduler([ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.5)]),
    "sequence": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda _: 1.0), LambdaLR(optimizer, lambda epoch: 0.5**epoch)], [2]
    ),
}


class Scheduled(toys.Toy):
    """Notes the rate at the end of each epoch, before its scheduler has stepped."""

    def __init__(self, make: Callable[[Optimizer], Any]) -> None:
        super().__init__()
        self.make, self.rates = make, {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.rates[self.current_epoch] = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "monitor": "val_loss"}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_change_of_accumulation_lasts_through_the_epochs(name: str, tmp_path: Path) -> None:
    plain, changed = Scheduled(SCHEDULES[name]), Scheduled(SCHEDULES[name])
    for module, callbacks in ((plain, []), (changed, [AdaptiveAccumulation({2: 1})])):
        run = toys.trainer(tmp_path, max_epochs=4, accumulate_grad_batches=4, callbacks=callbacks)
        run.fit(module, toys.loader(16), toys.loader(4))
    # A quarter of the rows from the second epoch on, and so half of the rate.
    halves = {epoch: rate / (1 if epoch == 0 else 2) for epoch, rate in plain.rates.items()}
    assert len(set(plain.rates.values())) > 1
    assert changed.rates == pytest.approx(halves, rel=1e-6, abs=1e-7)
