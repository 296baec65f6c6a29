"""Settings that a user gives a module take effect, or are refused; adapters of other settings are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

import lightning_lora as ll
from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys
from tests.support.toys import Plain, Toy, fit

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


class Stored(LoRAMixin, Plain):
    """Stores the settings it is given, and sets them only if told to."""

    def __init__(self, lora: Any = None, sets: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        if sets:
            self.lora = lora


class StoredUnderAnotherName(LoRAMixin, Plain):
    def __init__(self, adapters: Any) -> None:
        super().__init__()
        self.adapters = adapters


class StoredBesideTheClass(Stored):
    lora = LoRAConfig(rank=1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Stored(CONFIG), r"Stored was given LoRA settings \(hparams.lora\).*would train in full"),
        (lambda: Stored({"rank": 2}), r"hparams.lora.*Pass them on with super\(\).__init__\(lora=...\)"),
        (lambda: StoredUnderAnotherName(CONFIG), r"\(self.adapters\) that have no effect"),
        (lambda: StoredBesideTheClass(CONFIG), r"would use those of its class \(rank 2 -> 1\)"),
    ],
)
def test_settings_that_nothing_reads_are_refused(make: Any, text: str, tmp_path: Path) -> None:
    module = make()
    before = toys.snapshot(module)
    with pytest.raises(ConfigError, match=text):
        fit(module, tmp_path)
    with pytest.raises(ConfigError, match=text):
        module.lora_parameter_groups(0.1)
    assert toys.same(before, toys.snapshot(module))


class WithoutMixin(Plain):
    lora = CONFIG


def test_settings_of_a_module_without_the_mixin_are_refused_by_the_guard(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"WithoutMixin has LoRA settings \(lora\) that nothing reads.*LoRAMixin first"
    ):
        fit(WithoutMixin(), tmp_path, callbacks=[LoRAGuard()])
    module = WithoutMixin()
    ll.inject_lora(module, module.lora)
    fit(module, tmp_path, callbacks=[LoRAGuard()])


def test_settings_that_were_set_or_left_out_are_used(tmp_path: Path) -> None:
    adapted, plain, chosen = Stored(CONFIG, sets=True), Stored(), Stored(CONFIG)
    chosen.lora = None
    for module in (adapted, plain, chosen):
        fit(module, tmp_path)
    assert [len(lora_layers(module)) for module in (adapted, plain, chosen)] == [2, 0, 0]


def test_parameter_groups_of_a_module_that_was_never_adapted_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Toy has lora settings and no adapters.*Call self.apply_lora\(\)"):
        Toy().lora_parameter_groups(0.1)


class Around(LightningModule):
    """A plain module with a `LoRAMixin` inside, which it adapts only if told to."""

    training_step = Plain.training_step
    configure_optimizers = Plain.configure_optimizers

    def __init__(self, applies: bool) -> None:
        super().__init__()
        self.inner, self.applies = Toy(), applies

    def configure_model(self) -> None:
        if self.applies:
            self.inner.apply_lora()

    def forward(self, x: Any) -> Any:
        return self.inner(x)


def test_a_module_inside_one_that_does_not_adapt_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"inner of Around has lora settings .* call self.inner.apply_lora\(\)"):
        fit(Around(applies=False), tmp_path)
    module = Around(applies=True)
    fit(module, tmp_path)
    assert all(toys.moved(module))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora": LoRAConfig(rank=1)}, r"Toy is adapted at rank 2 already, .*\(rank 2 -> 1\).*remove_lora\(module\)"),
        ({"lora": {"rank": 2, "targets": ["first"]}}, r"\(targets 'all' -> \['first'\]\)"),
        ({"lora_root": "net"}, "lora_root None -> 'net'"),
    ],
)
def test_changed_settings_of_an_adapted_module_are_refused(change: Any, text: str, tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path)
    before = toys.snapshot(module)
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(ConfigError, match=text):
        module.apply_lora()
    with pytest.raises(ConfigError, match=text):
        fit(module, tmp_path)
    assert toys.same(before, toys.snapshot(module))


def test_equal_settings_and_another_multiplier_are_not_a_change(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path)
    module.lora = {"rank": 2}
    fit(module, tmp_path)
    module.lora = LoRAConfig(rank=2, lr_multiplier=3)
    fit(module, tmp_path)
    (group,) = module.lora_parameter_groups(0.1)
    assert group["lr"] == pytest.approx(0.3)


def test_new_settings_are_taken_after_removal(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path)
    ll.remove_lora(module)
    module.lora, module.lora_root = LoRAConfig(rank=1), "net"
    fit(module, tmp_path)
    assert [layer.lora_spec.rank for layer in lora_layers(module).values()] == [1, 1]


def test_loaded_adapters_must_have_the_rank_and_scale_that_lora_asks_for(tmp_path: Path) -> None:
    source = Plain()
    ll.inject_lora(source, LoRAConfig(rank=2, targets=["net.first", "net.second"]))
    ll.save_adapter(source, tmp_path / "adapter")
    for lora, text in ((CONFIG, None), (LoRAConfig(rank=1), "rank 2 -> 1"), (LoRAConfig(rank=2, alpha=8), "16 -> 4")):
        module = Toy()
        module.lora = lora
        ll.load_adapter(module, tmp_path / "adapter")
        if text is None:
            fit(module, tmp_path)
        else:
            with pytest.raises(ConfigError, match=rf"adapted at rank 2 already.*net.first: .*{text}"):
                fit(module, tmp_path)
    other = Plain()
    ll.inject_lora(other, LoRAConfig(rank=1))
    with pytest.raises(ll.AdapterFileError, match=r"at another rank already: net.first has rank 1, the adapter 2"):
        ll.load_adapter(other, tmp_path / "adapter")


def test_the_callback_refuses_other_settings_until_the_adapters_are_gone(tmp_path: Path) -> None:
    module = Plain()
    fit(module, tmp_path, callbacks=[LoRA(CONFIG)])
    with pytest.raises(ConfigError, match=r"Plain is adapted at rank 2 already.*rank 2 -> 1"):
        fit(module, tmp_path, callbacks=[LoRA(LoRAConfig(rank=1))])
    fit(module, tmp_path, callbacks=[LoRA({"rank": 2})])
    ll.remove_lora(module)
    fit(module, tmp_path, callbacks=[LoRA(LoRAConfig(rank=1))])
    assert [layer.lora_spec.rank for layer in lora_layers(module).values()] == [1, 1]


@pytest.mark.parametrize("other", [LoRA(LoRAConfig(rank=1)), LoRA(CONFIG, root="net")])
def test_two_callbacks_of_different_settings_are_refused(other: LoRA, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two LoRA callbacks with different settings"):
        fit(Plain(), tmp_path, callbacks=[LoRA(CONFIG), other])
    fit(Plain(), tmp_path, callbacks=[LoRA(CONFIG), LoRA({"rank": 2})])


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        (LoRAConfig(rank=1), r"expected \(1, 4\).*trained with other settings \(rank 2 -> 1\)"),
        (LoRAConfig(rank=2, alpha=8), r"net.first has 16 there and 4 here.*\(alpha 32.0 -> 8\)"),
        (LoRAConfig(rank=2, scaling="rslora"), "with another scale, alpha / rank"),
    ],
)
def test_resuming_with_other_settings_is_refused(lora: LoRAConfig, text: str, tmp_path: Path) -> None:
    fit(Toy(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    module = Toy()
    module.lora = lora
    with pytest.raises(ll.AdapterFileError, match=text):
        fit(module, tmp_path, tmp_path / "a.ckpt", max_epochs=2)
