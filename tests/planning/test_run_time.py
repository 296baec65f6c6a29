"""A plan times batches where that takes seconds, and otherwise says how far its guess may be off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.errors import ConfigError
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.advice import run_time as room
from lightning_lora.planning.advice.run_time import Trial, product_speed, run_time
from lightning_lora.planning.cost import PRODUCT, TABLE, TIMED, RunSeconds, RunWork, StepWork
from lightning_lora.planning.devices import Devices, find_devices
from lightning_lora.planning.timing.shapes import Shape, Validation, Work, shape_of, training_shapes
from tests.planning.test_timed_steps import Data
from tests.support import toys
from tests.support.toys import Plain

pytestmark = toys.expected_warnings


def timed(
    calibrate: bool | None,
    *,
    flops: float = 1e6,
    weights: int = 100,
    module: type = Plain,
    devices: Devices | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> RunSeconds | None:
    shape = Shape(2, 1)
    run = RunWork(10, 10, [shape] * 4, Work.of(flops, 0, shape), Validation(3, [shape] * 3), 2)
    step = StepWork(MemoryParts(weights=weights), 2, "full")
    here = devices or find_devices(accelerator="cpu")
    return run_time(step, run, here, "32-true", Trial(module, Data(), trainer or {}, 2), calibrate)


def test_a_small_model_is_timed_without_being_asked_for() -> None:
    found = timed(None)
    assert found is not None
    assert found.source == TIMED
    assert found.validation > 0


@pytest.mark.parametrize("large", [{"flops": 1e13}, {"weights": 2**30}])
def test_a_large_model_is_not_and_its_time_is_guessed_from_a_product(large: dict[str, Any]) -> None:
    found = timed(None, **large)
    assert found is not None
    assert found.source == PRODUCT
    assert found.how.endswith("--calibrate times some batches")
    assert found.high / found.low == pytest.approx(4)


def test_nothing_is_trained_where_it_is_refused() -> None:
    found = timed(False, module=Broken)
    assert found is not None
    assert found.source == PRODUCT
    named = timed(None, module=Broken, devices=find_devices(name="h100"))
    assert named is not None
    assert named.source == TABLE


class Broken(Plain):
    def __init__(self) -> None:
        raise OSError("no file named model.safetensors in here")


def test_a_model_without_weights_is_guessed_and_it_is_said_why() -> None:
    found = timed(None, module=Broken)
    assert found is not None
    assert found.how.endswith("not timed: no file named model.safetensors in here")
    with pytest.raises(OSError, match="no file named"):
        timed(True, module=Broken)


def test_only_devices_that_are_here_can_be_timed() -> None:
    with pytest.raises(ConfigError, match="calibrate times batches on this machine"):
        timed(True, devices=find_devices(name="h100"))
    with pytest.raises(ConfigError, match="do not fit into"):
        timed(True, weights=2**60)


def test_a_micro_batch_that_takes_long_is_timed_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(*_: Any, rows: int, **__: Any) -> None:
        asked.append(rows)

    monkeypatch.setattr(room, "time_steps", noted)
    monkeypatch.setattr(room, "product_speed", lambda *_: 1e11)
    assert timed(True, flops=1e12) is not None
    assert timed(True) is not None
    assert asked == [1, 2]


def test_batches_that_would_take_minutes_are_not_timed_even_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "product_speed", lambda *_: 1e11)
    found = timed(True, flops=1e13, module=Broken)
    assert found is not None
    assert found.source == PRODUCT
    assert found.how.endswith("not timed: 4 batches of one row would take about 7 minutes here")


def test_the_speed_of_a_product_is_that_of_the_best() -> None:
    ticks = iter([0, 0.0, 1.0, 1.0, 1.5, 1.5, 3.5, 3.5])
    speed = product_speed("float32", "cpu", lambda: next(ticks))
    assert speed == 2 * 768**3 / 0.5


def test_shapes_are_those_of_the_batches_that_training_draws(tmp_path: Path) -> None:
    from lightning_lora.data import SFTDataModule
    from lightning_lora.planning.set_up_data import set_up
    from lightning_lora.tasks import CausalLM

    llama = toys.save_llama(tmp_path / "llama")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{"what " * (1 + n % 6)}", "answer": "{n}"}}\n' for n in range(23)))
    module = CausalLM(str(llama), lora=ll.LoRAConfig(rank=2))
    with set_up(SFTDataModule(str(file), str(file), batch_size=4, max_length=40), module) as ready:
        assert training_shapes(ready) == [shape_of(batch) for batch in ready.train_dataloader()]
        assert len(training_shapes(ready, 8)) == 3
        validation = Validation.of(ready, limit=2)
        assert validation.batches == 2
        assert list(validation.shapes) == [shape_of(batch) for batch in ready.val_dataloader()][:2]
        assert ready.batch_size == 4
    assert shape_of(next(iter(DataLoader(toys.rows(8), batch_size=3)))) == Shape(3, 1)
