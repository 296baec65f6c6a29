"""Micro-batches that by their trace are clearly too large for the device are not tried; the trial has the last word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.callbacks import TargetBatchSize
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.memory import run_step
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.step_trace import trace_step
from tests.callbacks.memory.small_device import TOKENS, WIDTH, Module, Rows, bytes_of, have
from tests.support import cramped, toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_step, "SECONDS", 600.0)


def chosen(folder: Path, module: Module, rows: int = 16, batch_size: int = 16) -> EffectiveBatch | None:
    target = TargetBatchSize(rows)
    toys.trainer(folder, callbacks=[target]).fit(module, datamodule=Rows(batch_size))
    return target.batch


@pytest.mark.parametrize(("fits", "trained"), [(16, [16] * 2), (8, [8] * 4), (2, [2] * 16), (1, [1] * 32)])
def test_the_first_size_that_is_tried_is_the_one_that_fits(
    fits: int, trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(monkeypatch, bytes_of(fits, 16 // fits))
    with caplog.at_level(logging.INFO):
        assert chosen(tmp_path, Module(fits)) == EffectiveBatch(fits, 16 // fits, 1)
    assert Module.tried == [fits, *trained]
    told = f"a batch_size above {fits} is not tried: a traced step with batches of {fits} takes 0."
    assert (told in caplog.text) == (fits < 16)


def test_a_size_that_a_trace_may_have_overrated_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, int(bytes_of(8, 2) / 1.08))
    assert chosen(tmp_path, Module(8)) == EffectiveBatch(8, 2, 1)


def test_the_trial_decides_where_a_trace_was_too_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 10**12)
    assert chosen(tmp_path, Module(4)) == EffectiveBatch(4, 4, 1)
    assert Module.tried[:3] == [16, 8, 4]


def test_only_divisors_of_the_share_up_to_the_batch_size_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, bytes_of(5, 2))
    assert chosen(tmp_path, Module(5), rows=24, batch_size=6) == EffectiveBatch(4, 6, 1)
    assert Module.tried[0] == 4


def test_a_step_that_seems_too_large_with_one_row_is_tried_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, bytes_of(1, 16) // 2)
    with pytest.warns(
        UserWarning, match=r"not even one row .*: a traced step with batches of 1 takes 0.\d+ MB, and the"
    ):
        assert chosen(tmp_path, Module()) == EffectiveBatch(1, 16, 1)
    told = r"not even with one row: a traced step with batches of 1 takes 0.\d+ MB, and the device has 0.0\d+ MB"
    with pytest.warns(UserWarning, match="not even one row"), pytest.raises(MemoryError, match=told):
        chosen(tmp_path, Module(0))


def test_a_step_that_cannot_be_traced_is_tried_from_the_batch_size_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Untraceable(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            next(self.net.parameters()).detach().numpy()
            return super().training_step(batch, batch_idx)

    have(monkeypatch, 1)
    with caplog.at_level(logging.INFO):
        assert chosen(tmp_path, Untraceable(8)) == EffectiveBatch(8, 2, 1)
    assert Module.tried[:2] == [16, 8]
    assert caplog.text.count("micro-batches are tried from 16 rows down: a training step of Untraceable cannot be") == 1


def test_traces_end_when_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(monkeypatch, 1)
    monkeypatch.setattr(run_step, "SECONDS", -1.0)
    with caplog.at_level(logging.INFO):
        assert chosen(tmp_path, Module(8)) == EffectiveBatch(8, 2, 1)
    assert "16 rows down: no trace of 16 rows was begun" in caplog.text


@pytest.mark.parametrize(("num_bytes", "is_traced"), [(10**9, False), (10**4, True)])
def test_on_a_cpu_without_a_limit_only_a_model_that_fills_its_memory_is_traced(
    num_bytes: int, is_traced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = run_step.StepTracer
    monkeypatch.setattr(run_step, "StepTracer", lambda *arguments: made.append(1) or real(*arguments))
    have(monkeypatch, num_bytes, is_limit=False)
    if is_traced:
        with pytest.warns(UserWarning, match="not even one row"):
            chosen(tmp_path, Module())
    else:
        chosen(tmp_path, Module())
    assert bool(made) is is_traced


def test_a_traced_search_ends_in_the_run_that_was_given_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, given = cramped.Cramped(), cramped.Cramped()
    found.room = 4
    batch = next(iter(cramped.Data(4).train_dataloader()))
    have(monkeypatch, trace_step(cramped.Cramped(), batch, accumulate_grad_batches=4).memory.total)
    with caplog.at_level(logging.INFO):
        cramped.fit(tmp_path, TargetBatchSize(16), found, cramped.Data())
    assert "a batch_size above 4 is not tried" in caplog.text
    assert "does not fit" not in caplog.text
    cramped.fit(tmp_path, None, given, cramped.Data(4), accumulate_grad_batches=4)
    assert toys.same(toys.snapshot(found), toys.snapshot(given))
    assert (found.sizes, found.drawn, found.steps) == (given.sizes, given.drawn, given.steps)


def test_a_module_on_another_device_is_traced_as_on_a_cpu() -> None:
    """A GPU is not at hand: the meta device stands for it."""
    module, batch = Module(), [torch.ones(4, TOKENS, WIDTH)]
    module.register_buffer("seen", torch.zeros(3))
    here = trace_step(module, batch)
    module.to("meta")
    assert trace_step(module, batch) == here
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_a_step_that_is_not_traced_says_why(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, max_steps=1)
    trainer.fit(module := Module(), datamodule=Rows())

    def no_batch(rows: int) -> Any:
        raise KeyError("rows")

    step = run_step.RunStep(trainer, lambda: module, no_batch)
    with pytest.raises(TraceError, match="a step of Module cannot be traced: KeyError: 'rows'"):
        step.memory(2, 1)
