"""Adapters keep their dtype, device and mode whatever Lightning does to the module around them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_lora import LoRAConfig, LoRAMixin, lora_layers
from tests.support import toys
from tests.support.toys import Net, Plain, Toy, fit

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


class EvalBase(LoRAMixin, Plain):
    def __init__(self, lora_root: str | None = None) -> None:
        super().__init__(lora=CONFIG, lora_root=lora_root)
        self.net = Net().eval()


@pytest.mark.parametrize("root", [None, "net"])
def test_base_left_in_eval_mode_warns_once(root: str | None, tmp_path: Path) -> None:
    module = EvalBase(root)
    with pytest.warns(UserWarning, match="the base model is in eval mode"):
        fit(module, tmp_path)
    toys.trainer(tmp_path).test(module, toys.loader(), verbose=False)
    fit(module, tmp_path)


def test_module_put_in_eval_mode_as_a_whole_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvalBase().eval().apply_lora()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_adapters_stay_float32_under_true_precision(precision: Any, tmp_path: Path) -> None:
    module = Toy()
    states: list[torch.dtype] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            states.extend(state["exp_avg"].dtype for state in trainer.optimizers[0].state.values())

    fit(module, tmp_path, precision=precision, callbacks=[Look()])
    layer = lora_layers(module)["net.first"]
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    assert layer.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert states == [torch.float32] * 4


def test_resuming_in_bfloat16_keeps_every_bit_of_the_adapters(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Toy, Any]:
        module = Toy()
        runner = toys.trainer(tmp_path, max_epochs=epochs, precision="bf16-true")
        runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    # A bfloat16 adapter has 8 significant bits: what a cast on the way in loses shows in the end.
    torch.manual_seed(3)
    whole, _ = run(2)
    torch.manual_seed(3)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_moving_the_module_moves_its_adapters() -> None:
    module = Toy()
    module.apply_lora()
    module.to(torch.float64)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    module.to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
