"""The callback adapts a module that cannot be edited, as the mixin does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_lora import ConfigError, GuardError, LoRAConfig, LoRAMixin, TargetNotFoundError, lora_layers
from lightning_lora.callbacks import LoRA
from tests.support import toys
from tests.support.toys import Net, Plain, Toy

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


def fit(module: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    runner = toys.trainer(folder, callbacks=list(callbacks), **options)
    runner.fit(module, toys.loader(), weights_only=True)
    return runner


def test_it_needs_no_arguments(tmp_path: Path) -> None:
    module = Plain()
    with pytest.warns(UserWarning, match="rank 32 is more than 2 of 2 adapted layers can hold"):
        fit(module, tmp_path, LoRA())
    assert len(lora_layers(module)) == 2


def test_it_trains_what_the_mixin_trains(tmp_path: Path) -> None:
    runs = []
    for module, callbacks in ((Toy(), []), (Plain(), [LoRA(CONFIG)])):
        torch.manual_seed(0)
        fit(module, tmp_path, *callbacks).save_checkpoint(tmp_path / "a.ckpt")
        runs.append((toys.snapshot(module), torch.load(tmp_path / "a.ckpt", weights_only=True)))
    (mixin, one), (callback, other) = runs
    assert toys.same(mixin, callback)
    assert toys.same(one["state_dict"], other["state_dict"])
    assert one["optimizer_states"][0]["state"].keys() == other["optimizer_states"][0]["state"].keys()


def test_the_module_keeps_its_identity_and_its_type(tmp_path: Path) -> None:
    module = Plain()
    fit(module, tmp_path, LoRA({"rank": 2}, root="net"))
    assert isinstance(module, Plain)
    assert isinstance(module, LoRAMixin)
    assert type(module).__name__ == "Plain"
    assert list(lora_layers(module)) == ["net.first", "net.second"]


def test_resuming_with_the_callback_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, half, resumed = Plain(), Plain(), Plain()
    fit(whole, tmp_path, LoRA(CONFIG), max_epochs=2)
    torch.manual_seed(0)
    fit(half, tmp_path, LoRA(CONFIG)).save_checkpoint(tmp_path / "half.ckpt")
    runner = toys.trainer(tmp_path, max_epochs=2, callbacks=[LoRA(CONFIG)])
    runner.fit(resumed, toys.loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_one_module_may_meet_equal_settings_again(tmp_path: Path) -> None:
    module = Plain()
    fit(module, tmp_path, LoRA(CONFIG))
    toys.trainer(tmp_path, callbacks=[LoRA(LoRAConfig(rank=2))]).test(module, toys.loader(), verbose=False)
    with pytest.raises(ConfigError, match="Plain is adapted at rank 2 already"):
        fit(module, tmp_path, LoRA(LoRAConfig(rank=1)))


def test_a_module_with_the_mixin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Toy has LoRA settings of its own: change those, or drop the callback"):
        fit(Toy(), tmp_path, LoRA(LoRAConfig(rank=1)))


def test_wrong_settings_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="lora has no setting 'rnak'"):
        LoRA({"rnak": 2})


def test_wrong_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetNotFoundError, match=r"'frist' matches none .* did you mean 'first'"):
        fit(Plain(), tmp_path, LoRA(LoRAConfig(rank=2, targets=["frist"])))


def test_optimizer_built_in_init_is_refused(tmp_path: Path) -> None:
    class Early(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())

        def configure_optimizers(self) -> Any:
            return self.optimizer

    with pytest.raises(GuardError, match="are in no optimizer"):
        fit(Early(), tmp_path, LoRA(CONFIG))


def test_layers_built_in_configure_model_are_adapted(tmp_path: Path) -> None:
    class Late(Plain):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.extra(super().forward(x))

    module = Late()
    fit(module, tmp_path, LoRA(CONFIG))
    assert list(lora_layers(module)) == ["net.first", "net.second", "extra"]
    assert all(toys.moved(module))


@pytest.mark.parametrize("order", [1, -1])
def test_stochastic_weight_averaging_is_refused(order: int, tmp_path: Path) -> None:
    callbacks = [LoRA(CONFIG), StochasticWeightAveraging(0.1)][::order]
    with pytest.raises(ConfigError, match="Use AdapterEMA"):
        fit(Plain(), tmp_path, *callbacks)


def test_ema_behind_it_averages_the_adapters(tmp_path: Path) -> None:
    module, base = Plain(), toys.snapshot(Plain())
    fit(module, tmp_path, LoRA(CONFIG), EMAWeightAveraging(decay=0.5))
    assert all(toys.moved(module))
    assert toys.same(base, toys.base_of(module))


def test_ema_in_front_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="put LoRA before EMAWeightAveraging"):
        fit(Plain(), tmp_path, EMAWeightAveraging(decay=0.5), LoRA(CONFIG))


def test_adapter_checkpoint_into_the_bare_module_is_an_error(tmp_path: Path) -> None:
    fit(Plain(), tmp_path, LoRA(CONFIG)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_net_stays_plain() -> None:
    assert type(Plain().net) is Net
