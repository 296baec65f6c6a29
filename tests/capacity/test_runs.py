"""The monitor in runs that step their optimizers by hand, and in runs that are resumed around a growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.callbacks import CapacityMonitor, RankGrowth
from tests.capacity.test_settings import Decaying, no_pictures, truncated_loss
from tests.support import toys

pytestmark = toys.expected_warnings
__all__ = ["no_pictures"]


class TwoByHand(Decaying):
    """Steps two optimizers in every batch by itself, and tells the loss of each row."""

    def __init__(self) -> None:
        super().__init__({})
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # pyright: ignore
        for optimizer in cast("list[Any]", self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
        for schedule in cast("list[Any]", self.lr_schedulers()):
            schedule.step()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": (self(batch[0]) - batch[1]).square().mean(1)}

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(layer.parameters(), 0.05) for layer in (self.net.first, self.net.second)]
        return optimizers, [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.0, 24) for each in optimizers]


class Counting(CapacityMonitor):
    """Counts measurements of half the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def _half(self, meter: Any) -> None:
        self.steps.append(self.reading.step)
        super()._half(meter)


def test_two_optimizers_that_a_module_steps_by_hand_are_left_alone_and_measured(tmp_path: Path) -> None:
    def trained(*callbacks: Callback) -> TwoByHand:
        torch.manual_seed(0)
        module = TwoByHand()
        trainer = toys.trainer(tmp_path, callbacks=list(callbacks), max_epochs=3)
        trainer.fit(module, DataLoader(toys.rows(32), 4, shuffle=True), toys.loader(32, seed=1))
        return module

    monitor = Counting()
    watched_module = trained(monitor)
    assert toys.same(toys.snapshot(trained()), toys.snapshot(watched_module))
    reading = monitor.reading
    assert reading.half_loss == pytest.approx(truncated_loss(watched_module, half=True), rel=1e-5)
    assert reading.step == 48
    assert reading.rate == pytest.approx(1 / 24)
    assert reading.num_captured == 2
    assert reading.no_capture == ""
    # Of 48 steps, two in a batch: every fifth is passed, not met.
    assert monitor.steps[:4] == [6, 10, 16, 20]


PLACES = (6, 20)
"""Batches in mid-epoch and in open windows: before the first growth, and after it."""


def test_a_run_resumed_before_or_after_a_growth_gives_the_same_reading(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (place := trainer.fit_loop.epoch_loop.total_batch_idx) in PLACES:
                trainer.save_checkpoint(tmp_path / f"{place}.ckpt")

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[Decaying, CapacityMonitor]:
        monitor, module = CapacityMonitor(), Decaying({"rank": 1})
        torch.manual_seed(0)
        growth = RankGrowth(max_rank=2, every_n_steps=6, threshold=1e-9)
        settings: dict[str, Any] = {"max_epochs": -1, "max_steps": 24, "accumulate_grad_batches": 2}
        trainer = toys.trainer(tmp_path / "run", callbacks=[growth, monitor, *callbacks], **settings)
        loaders = DataLoader(toys.rows(32), 4, shuffle=True), toys.loader(32, seed=1)
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return module, monitor

    module, whole = run(Saves())
    assert [group.rank for group in whole.reading.groups.values()] == [2, 2]
    for place in PLACES:
        again, resumed = run(ckpt_path=tmp_path / f"{place}.ckpt")
        assert resumed.reading == whole.reading, place
        assert toys.same(toys.snapshot(again), toys.snapshot(module)), place
