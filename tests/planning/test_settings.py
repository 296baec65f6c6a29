"""Steps are counted as Lightning counts them; rates and rows follow their rules and say where these come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from lightning_lora.errors import ConfigError
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.settings import alarm, choose_rate, choose_rows, divide_step, tinker_rate
from tests.support import toys

pytestmark = [*toys.expected_warnings]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "max_steps": 5},
        {"max_epochs": 1, "limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"max_epochs": 1, "limit_train_batches": 2},
        {"max_steps": 7},
    ],
    ids=str,
)
def test_steps_are_those_that_lightning_takes(tmp_path: Path, settings: dict[str, Any], drop_last: bool) -> None:
    loader = DataLoader(toys.rows(11), batch_size=2, drop_last=drop_last)
    trainer = toys.trainer(tmp_path, **({"max_epochs": None} | settings))
    trainer.fit(toys.Plain(), loader)
    planned = RunLength.of(settings).steps(Epoch.of(loader), 2, settings.get("accumulate_grad_batches", 1), 1)
    assert planned == trainer.global_step


@pytest.mark.parametrize(("rows", "devices", "micro"), [(11, 2, 2), (12, 4, 2), (3, 4, 2), (7, 3, 1)])
def test_devices_draw_equally_many_batches(rows: int, devices: int, micro: int) -> None:
    sampler = DistributedSampler(toys.rows(rows), devices, 0)
    loader = DataLoader(toys.rows(rows), batch_size=micro, sampler=sampler)
    assert Epoch(rows, micro).batches(micro, devices) == len(loader)


def test_a_stream_needs_a_number_of_steps() -> None:
    stream = Epoch(None, 4)
    assert RunLength(1, 50).steps(stream, 4, 2, 1) == 50
    with pytest.raises(ConfigError, match=r"Set trainer\.max_steps"):
        RunLength(1).steps(stream, 4, 2, 1)


def test_the_tinker_law_is_used_for_its_families_only() -> None:
    assert tinker_rate(LlamaConfig(hidden_size=2000, num_attention_heads=8)) == pytest.approx(5e-5)
    assert tinker_rate(LlamaConfig(hidden_size=4096)) == pytest.approx(5e-5 * (2000 / 4096) ** 0.781)
    assert tinker_rate(Qwen3Config(hidden_size=4096)) == pytest.approx(5e-5 * (2000 / 4096) ** 0.0775)
    assert tinker_rate(GPT2Config()) is None
    assert tinker_rate(None) is None


def test_the_rate_of_the_user_stays() -> None:
    rate, reason = choose_rate(3e-4, 2e-5, LlamaConfig(hidden_size=2000, num_attention_heads=8), "adapters at 10")
    assert rate == 3e-4
    assert "fitted at batch 128" in reason.why
    assert reason.why.startswith("yours; adapters at 10; ")
    rate, reason = choose_rate(None, 2e-5, GPT2Config(), "")
    assert rate == 2e-5
    assert "sweep" in reason.why
    assert choose_rate(None, None, None, "")[0] is None


@pytest.mark.parametrize(("rows", "expected"), [(7_473, 32), (10_000, 32), (1_000_000, 128), (200_000, 128)])
def test_rows_of_a_step_grow_with_the_data(rows: int, expected: int) -> None:
    assert choose_rows(Epoch(rows, 8), RunLength(1), 1)[0] == expected


def test_rows_of_a_step_are_lowered_for_a_hundred_steps() -> None:
    rows, _ = choose_rows(Epoch(900, 8), RunLength(1), 1)
    assert rows == 8
    assert divide_step(rows, 1, 64, Epoch(900, 8), RunLength(1)).steps == 113
    assert choose_rows(Epoch(10, 8), RunLength(1), 1)[0] == 1
    assert "lowered" in choose_rows(Epoch(10, 8), RunLength(1), 1)[1].why
    assert choose_rows(Epoch(300, 8), RunLength(-1, 500), 1)[0] == 8


@pytest.mark.parametrize(("largest", "devices"), [(5, 1), (1, 2), (64, 4), (0, 1)])
def test_micro_batches_make_the_rows_of_a_step(largest: int, devices: int) -> None:
    batch = divide_step(32, devices, largest, Epoch(7_473, 8), RunLength(1))
    assert batch.rows == 32
    assert batch.batch_size <= max(1, largest)


def test_few_steps_raise_an_alarm() -> None:
    starved = alarm(99, 10)
    assert starved is not None
    assert "WARNING" in starved.why
    assert "anecdotal" in starved.why
    few = alarm(100, 10)
    assert few is not None
    assert "WARNING" not in few.why
    assert alarm(1000, 10) is None
