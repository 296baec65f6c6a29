"""The learning rates of adapters and fully trained parameters, and their schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.mixin.optim import ADAPTER_EPS
from tests.support import toys
from tests.tasks.conftest import Record, fit, make

pytestmark = toys.expected_warnings


def test_adapters_learn_at_ten_times_the_rate(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, learning_rate=2e-3), Record()
    runner = fit(module, tmp_path, callbacks=[record])
    assert record.rates == [(2e-2,)] * 4
    (group,) = runner.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.95), 0.0, ADAPTER_EPS)
    full = make(llama_folder, lora=None, weight_decay=0.1)
    runner = fit(full, tmp_path)
    (group,) = runner.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-3, 0.1)
    assert len(group["params"]) == len(list(full.parameters()))


def test_modules_trained_in_full_learn_at_the_rate_itself(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, lora=LoRAConfig(rank=2, trainable=["model.norm"])), Record()
    fit(module, tmp_path, callbacks=[record])
    assert record.rates == [(2e-2, 2e-3)] * 4


@pytest.mark.parametrize(
    ("schedule", "warmup", "shape"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0, 0.5, 1, 0.5]),
        ("cosine", 0, [1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules(schedule: str, warmup: int, shape: list[float], llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, schedule=schedule, warmup_steps=warmup), Record()
    fit(module, tmp_path, callbacks=[record])
    assert [rate for (rate,) in record.rates] == pytest.approx([2e-2 * part for part in shape])


def test_schedule_counts_optimizer_steps_not_micro_batches(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, schedule="linear"), Record()
    fit(module, tmp_path, callbacks=[record], accumulate_grad_batches=2)
    assert [rate for (rate,) in record.rates] == pytest.approx([2e-2, 1e-2])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),  # of 7 batches, so that an epoch ends with a short window
        ({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 3}, 5),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
    ],
)
def test_a_run_that_goes_on_has_the_rates_of_a_straight_one(
    options: dict[str, Any], steps: int, llama_folder: Path, tmp_path: Path
) -> None:
    rows: Any = toys.token_rows(14)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    def rates(ckpt_path: Path | None = None, *callbacks: Callback) -> list[float]:
        record = Record()
        runner = toys.trainer(tmp_path, callbacks=[record, *callbacks], **options)
        module = make(llama_folder, schedule="cosine", warmup_steps=2)
        runner.fit(module, DataLoader(rows, 2), ckpt_path=ckpt_path, weights_only=True)
        assert runner.optimizers[0].param_groups[0]["lr"] == 0
        return [rate for (rate,) in record.rates]

    straight = rates(None, Save())
    parts = [0, 0.5, *((1 + math.cos(math.pi * step / (steps - 2))) / 2 for step in range(steps - 2))]
    assert straight == pytest.approx([2e-2 * part for part in parts])
    for place in (1, 3, 5, 8):  # in a window and after it, in the first epoch and in the second
        resumed = rates(tmp_path / f"{place}.ckpt")
        assert 0 < len(resumed) <= steps - place // 3
        assert resumed == straight[-len(resumed) :]


def test_warm_up_longer_than_the_run_warns(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, warmup_steps=10)
    with pytest.warns(UserWarning, match="warmup_steps=10, but the run has 4 steps: it never leaves warm-up"):
        fit(module, tmp_path)


def test_dry_run_with_warm_up_passes_the_guard(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, warmup_steps=1)
    with pytest.warns(UserWarning, match="it never leaves warm-up"):
        fit(module, tmp_path, fast_dev_run=True, callbacks=[LoRAGuard()])


def test_weight_decay_that_reaches_no_parameter_is_told(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 has no effect: adapters get none"):
        fit(make(llama_folder, weight_decay=0.1), tmp_path)
    fit(make(llama_folder, weight_decay=0.1, lora=LoRAConfig(rank=2, trainable=["model.norm"])), tmp_path)
