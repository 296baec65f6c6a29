"""Timed steps are steps of the real run, and leave no trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.planning.cost import TIMED
from lightning_lora.planning.timed_steps import StepTimes, time_steps
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(toys.rows(8), batch_size=2, shuffle=True, generator=self.generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return toys.loader(6)


class Clock:
    """Goes on by one second with every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("is_built", [False, True])
def test_timing_leaves_no_trace(is_built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, data = Toy(), Data()
    if is_built:
        module.configure_model()
    before, position = toys.snapshot(module), data.generator.get_state()
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert time_steps(module, data, steps=3) is not None
    assert draws() == expected
    assert toys.same(before, toys.snapshot(module))
    assert torch.equal(position, data.generator.get_state())
    assert data.trainer is None
    assert not list(tmp_path.iterdir())


def test_whole_optimizer_steps_are_timed_after_a_warm_up_and_without_validation() -> None:
    found = time_steps(Plain(), Data(), {"accumulate_grad_batches": 2, "max_epochs": 1}, steps=5, clock=Clock())
    assert found is not None
    # Every look at the clock takes a second; the second one is where a validation between epochs was left out.
    assert len(found.seconds) == 5
    assert set(found.seconds) <= {1.0, 2.0}
    assert found.sizes == [4] * 5
    assert found.usual_size == 4
    assert len(found.validation) == 2
    assert set(found.validation) == {1.0}


def test_no_step_begins_when_time_is_over() -> None:
    found = time_steps(Plain(), Data(), steps=50, max_seconds=1.0, clock=Clock())
    assert found is not None
    assert len(found.seconds) == 2


def test_a_run_is_scaled_by_the_size_of_its_batches() -> None:
    times = StepTimes([1.0, 2.0, 3.0], [100, 200, 300], usual_size=250, validation=[0.5, 0.5])
    run = times.for_run(10, validation_batches=4)
    assert run.per_step == pytest.approx(2.5)
    assert run.total == pytest.approx(25 + 2)
    assert run.source == TIMED
    # The steps lie on the line exactly: what is left is that another minute may be slower.
    assert (run.low, run.high) == (pytest.approx(0.9 * 27), pytest.approx(1.1 * 27))


def test_steps_that_vary_widen_the_interval() -> None:
    even = StepTimes([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], 1).for_run(1)
    uneven = StepTimes([0.5, 1.5, 0.7, 1.3], [1, 1, 1, 1], 1).for_run(1)
    single = StepTimes([1.0], [1], 1).for_run(1)
    assert even.high < single.high <= uneven.high
    assert uneven.low >= 0


class TooLarge(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Broken(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("shapes do not fit")


def test_what_does_not_fit_has_no_time_and_other_errors_are_told() -> None:
    assert time_steps(TooLarge(), Data()) is None
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        time_steps(Broken(), Data())
