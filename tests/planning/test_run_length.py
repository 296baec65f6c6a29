"""Passes over the validation rows, and micro-batches, are those of a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lora.planning.advice.epoch import Epoch, RunLength
from tests.support import toys
from tests.support.toys import Plain

pytestmark = toys.expected_warnings


class Counted(Callback):
    """Counts what a run does; the sanity check before training is not part of it."""

    def __init__(self) -> None:
        self.validations = self.batches = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1


class Validated(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2},
        {"max_epochs": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "val_check_interval": 0.3},
        {"max_epochs": 2, "val_check_interval": 3},
        {"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 2, "val_check_interval": 2},
        {"max_epochs": 1, "accumulate_grad_batches": 3, "limit_train_batches": 5},
        {"max_epochs": 1, "limit_train_batches": 0.5},
        {"max_epochs": 2, "overfit_batches": 2},
    ],
)
def test_validations_and_batches_are_counted_as_a_trainer_does(settings: dict[str, Any], tmp_path: Path) -> None:
    seen = Counted()
    loader = DataLoader(toys.rows(13), batch_size=2)
    toys.trainer(tmp_path, **settings, callbacks=[seen]).fit(Validated(), loader, toys.loader(2))
    length = RunLength.of(settings)
    how = Epoch.of(loader), 2, settings.get("accumulate_grad_batches", 1), 1
    assert length.validations(*how) == seen.validations
    assert sum(length.parts(*how)) == seen.batches


def test_a_clock_decides_when_to_validate() -> None:
    assert RunLength.of({"val_check_interval": "00:01:00:00"}).validations(Epoch(13, 2), 2, 1, 1) is None
