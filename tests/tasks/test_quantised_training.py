"""Quantised bases under a Trainer: Lightning's own plugin, mixed precision, checkpoints, merging at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, inject_lora, lora_layers
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.callbacks import LoRA, LoRAGuard, MergeOnFitEnd
from lightning_lora.errors import GuardError
from lightning_lora.lora.layers import LoRAQuantisedLinear
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import toys
from tests.support.metered import gradients_of, measure
from tests.support.quantised_models import KINDS, ROWS, adapted, bnb, difference, plain, quantised

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

CONFIG = LoRAConfig(rank=2)


def runner(folder: Path, plugin: BitsandbytesPrecision | None = None, **options: Any) -> Trainer:
    """A Trainer on the CPU, also with a plugin that Lightning accepts on CUDA only; bitsandbytes runs on both."""
    trainer = toys.trainer(folder, **options)
    if plugin is not None:
        trainer.strategy.precision_plugin = plugin
    return trainer


class Late(LightningModule):
    """Builds its layers in ``configure_model``, where the plugin's class stands for ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.net: toys.Net | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = toys.Net()

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    training_step = toys.Plain.training_step
    validation_step = toys.Plain.validation_step
    configure_optimizers = toys.Plain.configure_optimizers


class LateToy(LoRAMixin, Late):
    lora = CONFIG


Made = tuple[LightningModule, list[Any]]
MODULES: dict[str, Callable[[], Made]] = {
    "mixin": lambda: (toys.Toy(), []),
    "callback": lambda: (toys.Plain(), [LoRA(CONFIG)]),
    "mixin, built late": lambda: (LateToy(), []),
    "callback, built late": lambda: (Late(), [LoRA(CONFIG)]),
}
MODES = {"nf4": torch.float32, "nf4-dq": torch.float32, "fp4": torch.bfloat16, "int8": torch.float16}


@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("mode", MODES)
def test_lightnings_plugin_quantises_what_is_adapted(mode: Any, made: str, tmp_path: Path) -> None:
    module, callbacks = MODULES[made]()
    trainer = runner(
        tmp_path, BitsandbytesPrecision(mode, MODES[mode]), callbacks=[*callbacks, LoRAGuard()], max_epochs=5
    )
    before = trainer.validate(module, toys.loader(), verbose=False)[0]["val_loss"]
    trainer.fit(module, toys.loader(), toys.loader())
    layers = lora_layers(module)
    assert list(layers) == ["net.first", "net.second"]
    for layer in layers.values():
        assert isinstance(layer, LoRAQuantisedLinear)
        assert isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        assert layer.weight.dtype == (torch.int8 if mode == "int8" else torch.uint8)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.lora_moved
    assert trainer.callback_metrics["val_loss"] < before


@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_under_the_plugin_holds_adapters_only_and_resumes(mode: Any, made: str, tmp_path: Path) -> None:
    plugin = BitsandbytesPrecision(mode, MODES[mode])
    module, callbacks = MODULES[made]()
    trainer = runner(tmp_path, plugin, callbacks=callbacks, max_epochs=1)
    trainer.fit(module, toys.loader(), toys.loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"net.{layer}.lora_{factor}" for layer in ("first", "second") for factor in "AB"}

    torch.manual_seed(7)  # other random factors, which the checkpoint must replace
    other, callbacks = MODULES[made]()
    trainer = runner(tmp_path, plugin, callbacks=callbacks, max_epochs=1)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    trainer.validate(other, toys.loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False, weights_only=True)
    assert toys.same({name: other.state_dict()[name] for name in expected}, expected)
    trainer.validate(other, toys.loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False, weights_only=True)
    trainer = runner(tmp_path, plugin, callbacks=callbacks, max_epochs=2)
    trainer.fit(other, toys.loader(), toys.loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning accepts BitsandbytesPrecision on CUDA only")
@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("mode", MODES)
def test_lightnings_plugin_on_a_gpu(mode: Any, made: str, tmp_path: Path) -> None:
    module, callbacks = MODULES[made]()
    plugin = BitsandbytesPrecision(mode)
    options = {"accelerator": "cuda", "plugins": [plugin], "callbacks": [*callbacks, LoRAGuard()]}
    toys.trainer(tmp_path, max_epochs=2, **options).fit(module, toys.loader(), toys.loader())
    layers = lora_layers(module)
    assert list(layers) == ["net.first", "net.second"]
    assert all(isinstance(layer, LoRAQuantisedLinear) and layer.lora_A.is_cuda for layer in layers.values())


def test_layers_that_change_their_weights_in_each_step_are_refused(tmp_path: Path) -> None:
    trainer = runner(tmp_path, BitsandbytesPrecision("int8-training"))
    with pytest.raises(TargetNotFoundError, match="quantises its weight anew in each step"):
        trainer.fit(toys.Toy(), toys.loader())


def test_adapters_that_the_plugin_would_replace_are_an_error(tmp_path: Path) -> None:
    module = toys.Toy()
    inject_lora(module, CONFIG)
    trainer = runner(tmp_path, BitsandbytesPrecision("nf4", torch.float32))
    with pytest.raises(ConfigError, match=r"would replace 2 adapted layers .*\(net.first, net.second\)"):
        trainer.fit(module, toys.loader())


def test_the_name_of_linear_is_what_it_was_after_the_plugin_has_run(tmp_path: Path) -> None:
    trainer = runner(tmp_path, BitsandbytesPrecision("nf4", torch.float32), fast_dev_run=True)
    trainer.fit(toys.Toy(), toys.loader())
    assert torch.nn.Linear is torch.nn.modules.linear.Linear


class Quantised(LoRAMixin, LightningModule):
    """A module whose base is quantised before Lightning sees it."""

    lora = LoRAConfig(rank=4, targets=["first", "second"])

    def __init__(self, kind: str = "nf4") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = quantised(kind)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - 1).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - 1).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3), lr=1e-3)


def rows() -> DataLoader[Any]:
    return DataLoader(TensorDataset(ROWS.repeat(4, 1)), batch_size=6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lower_the_loss_and_the_guard_finds_the_base_untouched(
    kind: str, precision: Any, tmp_path: Path
) -> None:
    module = Quantised(kind)
    trainer = runner(tmp_path, max_epochs=5, precision=precision, callbacks=[LoRAGuard()])
    before = trainer.validate(module, rows(), verbose=False)[0]["val_loss"]
    trainer.fit(module, rows(), rows())
    assert trainer.global_step == 20
    assert trainer.callback_metrics["val_loss"] < 0.5 * before
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4"])
def test_the_guard_sees_a_changed_scale(kind: str, tmp_path: Path) -> None:
    class Drifts(Quantised):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.net.second.weight.quant_state.absmax[0] += 1

    trainer = runner(tmp_path, callbacks=[LoRAGuard()])
    with pytest.raises(GuardError, match=r"1 frozen base weights were changed by training: net.second.weight"):
        trainer.fit(Drifts(kind), rows())


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_a_quantised_run_gives_the_adapters_of_the_run_that_did_not_stop(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Quantised(kind)
    runner(tmp_path, max_epochs=2).fit(whole, rows(), rows())

    torch.manual_seed(1)
    trainer = runner(tmp_path, max_epochs=1)
    trainer.fit(Quantised(kind), rows(), rows())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    resumed = Quantised(kind)
    runner(tmp_path, max_epochs=2).fit(resumed, rows(), rows(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    layers = lora_layers(whole)
    for name, layer in lora_layers(resumed).items():
        assert torch.equal(layer.lora_A, layers[name].lora_A)
        assert torch.equal(layer.lora_B, layers[name].lora_B)


@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint_rebuilds_the_quantised_module(kind: str, tmp_path: Path) -> None:
    module = Quantised(kind)
    trainer = runner(tmp_path)
    trainer.fit(module, rows())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Quantised.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(loaded.net.train()(ROWS), module.net.train()(ROWS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_merged_at_the_end_computes_what_the_run_computed(kind: str, tmp_path: Path) -> None:
    module = Quantised(kind)
    with pytest.warns(UserWarning, match="the merged model is not quantised"):
        runner(tmp_path, callbacks=[MergeOnFitEnd(str(tmp_path / "merged"))]).fit(module, rows())
    state = load_file(tmp_path / "merged" / "model.safetensors")
    fresh = plain()
    fresh.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        assert difference(fresh(ROWS), module.net.train()(ROWS)) < 2e-6


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = adapted("nf4")
        for parameter in self.net.head.parameters():
            parameter.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def test_rows_and_frozen_weights_are_measured_on_a_quantised_base(tmp_path: Path) -> None:
    module = Regression()
    (samples,) = measure(tmp_path, module, DataLoader(TensorDataset(ROWS), len(ROWS)), frozen_weights_every=1)
    gradients = gradients_of(module, [[row[None]] for row in ROWS])
    signal, trace = signal_and_trace(gradients.square().sum(1), gradients.mean(0).square().sum(), 1)
    assert samples["adapter"][:2] == pytest.approx((float(signal), float(trace)), rel=1e-4)
    assert samples["weight"].num_micro_batches == len(ROWS)
