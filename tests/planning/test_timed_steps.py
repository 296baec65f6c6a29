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

from lightning_lora.planning.cost import TIMED, RunWork
from lightning_lora.planning.timed_steps import StepTimes, time_steps
from lightning_lora.planning.timing.shapes import Shape, Validation, Work
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
    assert time_steps(module, data, batches=3) is not None
    assert draws() == expected
    assert toys.same(before, toys.snapshot(module))
    assert torch.equal(position, data.generator.get_state())
    assert data.trainer is None
    assert not list(tmp_path.iterdir())


def test_batches_and_optimizer_steps_are_timed_after_a_warm_up_and_without_validation() -> None:
    found = time_steps(Plain(), Data(), {"max_epochs": 1}, batches=5, clock=Clock())
    assert found is not None
    # Every look at the clock takes a second; the second one is where a validation between epochs was left out.
    assert len(found.micro) == len(found.optimizer) == 5
    assert set(found.micro) <= {1.0, 2.0}
    assert set(found.optimizer) == {1.0}
    assert found.shapes == [Shape(2, 1)] * 5
    assert found.validation == [(1.0, Shape(2, 1))] * 2


def test_no_batch_begins_when_time_is_over() -> None:
    found = time_steps(Plain(), Data(), batches=50, max_seconds=1.0, clock=Clock())
    assert found is not None
    assert len(found.micro) == 2


def test_fewer_rows_can_be_timed() -> None:
    class Settable(Data):
        batch_size = 4

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(toys.rows(8), batch_size=self.batch_size)

    data = Settable()
    found = time_steps(Plain(), data, rows=1, batches=2)
    assert found is not None
    assert found.shapes == [Shape(1, 1)] * 2
    assert data.batch_size == 4


def work(shapes: list[Shape], steps: int = 10, accumulation: int = 1, attention: float = 0.0) -> RunWork:
    return RunWork(steps, steps * accumulation, shapes, Work(1.0, attention), Validation(2, [Shape(1, 50)] * 2), 2)


def test_a_run_is_scaled_by_the_operations_of_its_batches() -> None:
    timed = [Shape(1, 100), Shape(1, 200), Shape(1, 300)]
    times = StepTimes([1.0, 2.0, 3.0], timed, [0.5] * 3, [(0.25, Shape(1, 50)), (0.5, Shape(1, 100))])
    found = times.for_run(work([Shape(1, 200), Shape(1, 300)], accumulation=2))
    assert found.per_step == pytest.approx(2 * 2.5 + 0.5)
    assert found.validation == pytest.approx(2 * 2 * 0.25)
    assert found.total == pytest.approx(10 * 5.5 + 1)
    assert found.source == TIMED
    # The batches lie on the line exactly: what is left is that another minute may be slower.
    assert (found.low, found.high) == (pytest.approx(0.9 * 56), pytest.approx(1.1 * 56))


def test_long_rows_take_more_than_their_positions() -> None:
    """Attention grows with the square: with positions alone, a run with longer rows than those timed came out low."""
    timed = [Shape(4, 100), Shape(4, 200)]
    seconds = [4 * length * (1 + 0.01 * length) for _, length in timed]
    run = work([Shape(4, 100), Shape(4, 500)], steps=2, attention=0.01)
    found = StepTimes(seconds, timed, [0.0, 0.0]).for_run(run)
    assert found.total == pytest.approx(sum(4 * length * (1 + 0.01 * length) for length in (100, 500)))


def test_what_is_not_alike_widens_the_interval() -> None:
    same = [Shape(1, 1)] * 4
    even = StepTimes([1.0] * 4, same, [0.0]).for_run(work(same))
    uneven = StepTimes([0.5, 1.5, 0.7, 1.3], same, [0.0]).for_run(work(same))
    single = StepTimes([1.0], same[:1], [0.0]).for_run(work(same))
    fewer = StepTimes([1.0] * 4, same, [0.0]).for_run(work([Shape(8, 1)]))
    assert even.high < single.high <= uneven.high
    assert uneven.low >= 0
    assert fewer.high / fewer.total > even.high / even.total
    assert "of fewer rows" in fewer.how


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
