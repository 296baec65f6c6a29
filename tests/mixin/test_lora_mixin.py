"""The mixin fits into an existing module and into Lightning: few changed lines, hooks once, nothing lost."""

from __future__ import annotations

import difflib
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_lora as ll
from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import LoRA
from tests.support import toys
from tests.support.toys import Net, Plain, Toy, fit

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


def test_merged_module_is_not_trained(tmp_path: Path) -> None:
    class Merged(Toy):
        def on_fit_start(self) -> None:
            self.merge_lora()

    with pytest.raises(ConfigError, match="cannot train: 2 layers are merged"):
        fit(Merged(), tmp_path)


BEFORE = """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)
"""

AFTER = BEFORE.replace("class Mine(LightningModule):", "class Mine(LoRAMixin, LightningModule):\n    lora = CONFIG")


def defined(source: str) -> Any:
    scope = {"LightningModule": LightningModule, "LoRAMixin": LoRAMixin, "CONFIG": CONFIG, "Net": Net, "torch": torch}
    exec(textwrap.dedent(source), scope)
    return scope["Mine"]()


def test_an_existing_module_is_adapted_by_three_changed_lines_at_most(tmp_path: Path) -> None:
    changes = [line for line in difflib.ndiff(BEFORE.splitlines(), AFTER.splitlines()) if line[0] == "+"]
    assert len(changes) + 1 <= 3  # and one import
    module = defined(AFTER)
    fit(module, tmp_path)
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))


def test_an_existing_module_is_adapted_by_the_callback_without_any_change(tmp_path: Path) -> None:
    module = defined(BEFORE)
    fit(module, tmp_path, callbacks=[LoRA(CONFIG)])
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))


def test_lightnings_own_demo_module_is_adapted(tmp_path: Path) -> None:
    class Boring(LoRAMixin, BoringModel):
        lora = CONFIG

    module = Boring()
    toys.trainer(tmp_path, max_steps=3).fit(module)
    assert toys.moved(module) == [True]


def test_full_fine_tuning_is_untouched_lightning(tmp_path: Path) -> None:
    class Full(LoRAMixin, Plain):
        lora = None

    runs = {}
    for kind in (Plain, Full):
        torch.manual_seed(0)
        module = kind()
        runner = fit(module, tmp_path)
        runner.save_checkpoint(tmp_path / f"{kind.__name__}.ckpt")
        runs[kind] = (module, torch.load(tmp_path / f"{kind.__name__}.ckpt", weights_only=True))
    plain, full = runs[Plain], runs[Full]
    assert toys.same(toys.snapshot(plain[0]), toys.snapshot(full[0]))
    assert [*plain[1], "lightning_lora_resume"] == list(full[1])
    assert plain[1]["state_dict"].keys() == full[1]["state_dict"].keys()
    (by_position,), (by_name,) = plain[1]["optimizer_states"], full[1]["optimizer_states"]
    names = [name for name, _ in full[0].named_parameters()]
    assert [group | {"params": names} for group in by_position["param_groups"]] == by_name["param_groups"]
    torch.testing.assert_close(dict(zip(names, by_position["state"].values(), strict=True)), by_name["state"])
    assert full[0].strict_loading
    del full[1]["state_dict"]["net.first.bias"]
    torch.save(full[1], tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net.first.bias"):
        Full.load_from_checkpoint(tmp_path / "cut.ckpt", weights_only=True)


def test_strict_loading_set_by_the_user_is_kept() -> None:
    class Lenient(LoRAMixin, Plain):
        def __init__(self) -> None:
            super().__init__(lora=None)
            self.net = Net()
            self.strict_loading = False

    assert not Lenient().strict_loading
    module = Toy()
    assert module.strict_loading
    module.apply_lora()
    assert not module.strict_loading


def test_hooks_of_the_user_run_once_and_ours_around_them(tmp_path: Path) -> None:
    said: list[str] = []

    class Hooked(Toy):
        def on_train_start(self) -> None:
            said.append("start")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            said.append(f"save {len(checkpoint['state_dict'])}")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            said.append(f"load {len(checkpoint['state_dict'])}")

    class HookedAgain(Hooked):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            said.append("again")

    fit(HookedAgain(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    # The user sees the whole state when it is saved, and the completed one when it is loaded.
    HookedAgain.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert said == ["start", "save 8", "again", "load 8"]
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == 4


def test_module_saves_and_merges_itself(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path)
    x = torch.randn(3, 4)
    before = module(x)
    assert module.save_adapter(tmp_path / "adapter") == tmp_path / "adapter"
    fresh = Toy()
    ll.load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    module.merge_lora()
    torch.testing.assert_close(module(x), before)


def test_hooks_that_fabric_calls_need_no_trainer() -> None:
    fabric, module = Fabric(accelerator="cpu", devices=1), Toy()
    module.configure_model()
    fabric.setup(module)
    for hook in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
        fabric.call(hook)
    assert lora_layers(module)
