"""Settings of callbacks that a run never comes to are told at its start, or at its end where only that can tell."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_lora.callbacks import AdapterCheckpoint, AdapterEMA, RankGrowth
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings
BEYOND: list[tuple[Callback, str]] = [
    (
        RankGrowth(every_n_steps=9),
        "RankGrowth with every_n_steps=9 has no effect: the run ends with optimizer step 4",
    ),
    (AdapterEMA(update_starting_at_step=4), "AdapterEMA with update_starting_at_step=4 has no effect: the run ends"),
]
REACHED: list[Callback] = [
    RankGrowth(every_n_steps=4),
    AdapterEMA(update_starting_at_step=3),
]


def fit(callback: Callback, folder: Path, validation: Any = None) -> None:
    toys.trainer(folder, callbacks=[callback]).fit(Toy(), toys.loader(8, 2), validation)


@pytest.mark.parametrize(("callback", "told"), BEYOND, ids=[type(callback).__name__ for callback, _ in BEYOND])
def test_a_step_beyond_the_run_is_told(callback: Callback, told: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=told):
        fit(callback, tmp_path)


@pytest.mark.parametrize("callback", REACHED, ids=[type(callback).__name__ for callback in REACHED])
def test_a_step_of_the_run_is_not(callback: Callback, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no effect")
        fit(callback, tmp_path)


def test_a_best_adapter_that_no_validation_could_choose_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has written no 'best': after no validation was 'val_loss' a number"):
        fit(AdapterCheckpoint(monitor="val_loss"), tmp_path)
    with pytest.warns(UserWarning, match="mode='max' of AdapterCheckpoint has no effect: there is no monitor"):
        AdapterCheckpoint(mode="max")
