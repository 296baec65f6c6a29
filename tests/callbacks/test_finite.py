"""A gradient or weight that is not finite stops the run before it is taken or written, and the error names it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision  # the name alone would become bfloat16 on CPU
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import GradientError, GuardError, LoRAConfig, lora_state_dict
from lightning_lora.callbacks import FiniteGradients, LoRAGuard
from lightning_lora.tasks import CausalLM
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


def fit(module: LightningModule, folder: Path, count: int = 8, validation: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    runner = toys.trainer(folder, **({"callbacks": [FiniteGradients()]} | options))
    runner.fit(module, toys.loader(count), validation)
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


class Manual(toys.ByHand, Poisoned):
    """Steps its optimizer itself, through Lightning or without it."""

    raw = False

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


class Poison(Callback):
    """Puts one value that is not finite into one weight after a step, as a flipped bit or a bad kernel would."""

    def __init__(self, step: int, value: float, name: str) -> None:
        self.step, self.value, self.name = step, value, name

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.get_parameter(self.name).view(-1)[0] = self.value


def test_a_nan_that_the_loss_does_not_show_is_reported_within_one_interval(llama_folder: Path, tmp_path: Path) -> None:
    """Fault F11: torch's fused attention on a CPU gives a finite loss for NaN queries."""
    losses: dict[int, float] = {}

    class Frozen(CausalLM):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # The gradients are NaN too; without this FiniteGradients would stop the run.
            optimizer.zero_grad()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses[self.global_step] = float(outputs["loss"])

    tokens = torch.randint(5, 20, (40, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    name = "model.model.layers.0.self_attn.q_proj.lora_A"
    trainer = toys.trainer(tmp_path, callbacks=[Poison(7, float("nan"), name), LoRAGuard(patience=5)])
    module = Frozen(str(llama_folder), lora=LoRAConfig(rank=2))
    with pytest.raises(GuardError, match=rf"1 trained weights are NaN or infinite after optimizer step 10: {name}\. "):
        trainer.fit(module, DataLoader(cast(Any, rows), batch_size=2))
    assert all(map(math.isfinite, losses.values()))
    assert max(losses) >= 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(value: float, tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    poison = Poison(2, value, "net.first.lora_A")
    with pytest.raises(GuardError, match="trained weights are NaN or infinite after optimizer step 3"):
        fit(Toy(), tmp_path, callbacks=[LoRAGuard(patience=50), poison, files], enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_weights_that_are_not_finite_are_not_validated(tmp_path: Path) -> None:
    poison = Poison(2, float("nan"), "net.first.lora_A")
    options = {"validation": toys.loader(4), "val_check_interval": 3}
    with pytest.raises(GuardError, match="trained weights are NaN or infinite after optimizer step 3"):
        fit(Toy(), tmp_path, callbacks=[LoRAGuard(patience=50), poison], **options)


def test_large_weights_are_no_alarm(tmp_path: Path) -> None:
    """Only the norm of these weights overflows."""
    fit(Toy(), tmp_path, callbacks=[LoRAGuard(patience=1), Poison(2, 1e25, "net.first.lora_A")])
