"""A gradient that is not finite stops the run before the optimizer takes it, and the error names the parameter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision  # the name alone would become bfloat16 on CPU
from torch import Tensor

from lightning_lora import GradientError, lora_state_dict
from lightning_lora.callbacks import FiniteGradients
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings

NAME = "net.second.lora_A"


class Poisoned(Toy):
    """Puts a value into the gradients of some parameters after the backward pass of some batches."""

    def __init__(self, value: float = math.nan, batches: Any = (2,), names: tuple[str, ...] = (NAME,)) -> None:
        super().__init__()
        self.value, self.batches, self.names = value, batches, names

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            for name in self.names:
                gradient = self.get_parameter(name).grad
                assert gradient is not None
                gradient.view(-1)[0] = self.value


def fit(module: LightningModule, folder: Path, count: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    runner = toys.trainer(folder, **({"callbacks": [FiniteGradients()]} | options))
    runner.fit(module, toys.loader(count))
    return runner


def is_finite(module: Toy) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_weights_are_those_of_the_step_before(value: float, clip: float | None, tmp_path: Path) -> None:
    module, before = Poisoned(value), Poisoned(batches=())
    fit(before, tmp_path, max_steps=2, gradient_clip_val=clip)
    words = rf"'{NAME}' is NaN or infinite in optimizer step 3, made of batch 2 of"
    with pytest.raises(GradientError, match=words) as error:
        fit(module, tmp_path, gradient_clip_val=clip)
    assert ("gradient_clip_val" in str(error.value)) == (clip is None)
    assert toys.same(lora_state_dict(module), lora_state_dict(before))
    assert toys.moved(module) == [True, True]


def test_without_it_they_are_lost(tmp_path: Path) -> None:
    module = Poisoned()
    fit(module, tmp_path, callbacks=[])
    assert not is_finite(module)


def test_all_batches_of_an_accumulation_window_are_named(tmp_path: Path) -> None:
    with pytest.raises(GradientError, match="optimizer step 2, made of batches 2 to 3 of epoch 0"):
        fit(Poisoned(), tmp_path, accumulate_grad_batches=2)


def test_the_first_of_several_is_named_and_the_others_counted(tmp_path: Path) -> None:
    names = ("net.second.lora_B", "net.first.lora_B", NAME)
    with pytest.raises(GradientError, match=r"'net.first.lora_B' \(and of 2 other parameters\)"):
        fit(Poisoned(names=names), tmp_path)


def test_large_finite_gradients_pass(tmp_path: Path) -> None:
    module = Poisoned(1e30)  # whose square is no float32
    fit(module, tmp_path)
    assert is_finite(module)


def test_a_loss_that_is_nan_stops_the_run(tmp_path: Path) -> None:
    class Lost(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1)

    module = Lost()
    with pytest.raises(GradientError, match="optimizer step 2"):
        fit(module, tmp_path)
    assert is_finite(module)


def test_an_overflow_of_the_float16_scale_is_left_to_the_scaler(tmp_path: Path) -> None:
    module = Poisoned(math.inf, (1, 2))
    runner = fit(module, tmp_path, count=40, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert runner.precision_plugin.scaler.get_scale() <= 2.0**14
    assert is_finite(module)
    assert toys.moved(module) == [True, True]


def test_under_float16_what_no_scale_cures_stops_the_run(tmp_path: Path) -> None:
    module = Poisoned(math.nan, range(1000))
    with pytest.raises(GradientError, match="batch 17 of epoch 0"):
        fit(module, tmp_path, count=80, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert is_finite(module)
    assert toys.moved(module) == [False, False]


class Manual(Poisoned):
    """Steps by itself, through Lightning's optimizer or past it."""

    raw = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        optimizer.step()


def test_manual_optimization_is_covered(tmp_path: Path) -> None:
    module = Manual()
    with pytest.raises(GradientError, match=NAME):
        fit(module, tmp_path)
    assert is_finite(module)


def test_optimizers_stepped_past_lightning_are_reported(tmp_path: Path) -> None:
    class Raw(Manual):
        raw = True

    with pytest.warns(UserWarning, match=r"FiniteGradients saw no optimizer step.*self.optimizers\(\)"):
        fit(Raw(), tmp_path)
