"""What unfreezes the base during a run is refused: its weights would train in full, and no checkpoint would load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import ConfigError, GuardError, LoRAConfig, LoRAMixin, inject_lora, lora_layers
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys
from tests.support.toys import Net, Plain

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2, trainable=["head"])


class TransferLearning(Plain):
    """The module of Lightning's own example: a backbone, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone, self.head = Net(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Adapted(LoRAMixin, TransferLearning):
    lora = CONFIG


class OwnFinetuning(BaseFinetuning):
    """Unfreezes a layer in the second epoch, as Lightning's documentation shows it."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone.second, optimizer)


class OwnCallback(Callback):
    """The same without Lightning's base class."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            unfreeze(pl_module, trainer.optimizers[0])


def unfreeze(module: Any, optimizer: Optimizer) -> None:
    weights = [p for p in module.backbone.parameters() if not p.requires_grad]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer.add_param_group({"params": weights, "lr": 0.1})


REFUSED = {
    "backbone": lambda: BackboneFinetuning(1),
    "own": OwnFinetuning,
    "pruning": lambda: ModelPruning("l1_unstructured", amount=0.5),
    "swa": lambda: StochasticWeightAveraging(0.1),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("order", ["mixin", "adapted before", "after LoRA", "before LoRA", "by hand, with the guard"])
def test_callbacks_that_change_the_base_are_refused_before_the_first_step(
    name: str, order: str, tmp_path: Path
) -> None:
    callbacks: list[Callback] = [REFUSED[name]()]
    kind = type(callbacks[0]).__name__
    module: Any = Adapted() if order in ("mixin", "adapted before") else TransferLearning()
    if order == "adapted before":
        module.apply_lora()
    elif order == "by hand, with the guard":
        inject_lora(module, CONFIG)
        callbacks.append(LoRAGuard())
    elif order != "mixin":
        callbacks.insert(0 if order == "after LoRA" else 1, LoRA(CONFIG))
    before = toys.base_of(module)
    hint = {"pruning": "Prune the base before", "swa": "Use AdapterEMA instead"}.get(name, r"trainable=\[\.\.\.\]")
    with pytest.raises(ConfigError, match=rf"^{kind}.*{hint}"):
        toys.fit(module, tmp_path, max_epochs=2, callbacks=callbacks)
    assert toys.same(before, toys.base_of(module))


@pytest.mark.parametrize("name", REFUSED)
def test_they_may_stay_where_nothing_is_trained(name: str, tmp_path: Path) -> None:
    module = Adapted()
    toys.trainer(tmp_path, callbacks=[REFUSED[name]()]).validate(module, toys.loader(), verbose=False)
    assert lora_layers(module)


class InHook(Adapted):
    """Unfreezes the backbone in the hook that is given."""

    hook = ""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    def open(self, hook: str) -> None:
        late = hook not in ("on_train_batch_start", "on_before_zero_grad") or self.global_step == 2
        if hook == self.hook and late and not self.is_open:
            self.is_open = True
            unfreeze(self, self.optimizers(use_pl_optimizer=False))  # pyright: ignore[reportArgumentType]

    def on_fit_start(self) -> None:
        self.open("on_fit_start")

    def on_train_start(self) -> None:
        self.open("on_train_start")

    def on_train_epoch_start(self) -> None:
        self.open("on_train_epoch_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.open("on_train_batch_start")

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.open("on_before_zero_grad")


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"]
)
def test_a_module_that_unfreezes_its_base_is_stopped_before_a_step_changes_it(hook: str, tmp_path: Path) -> None:
    module = InHook()
    module.hook = hook
    before = toys.base_of(module.backbone)
    with pytest.raises(GuardError, match=r"4 frozen base weights were unfrozen after .* backbone.first.weight") as said:
        toys.fit(module, tmp_path)
    assert "LoRAConfig(trainable=[...])" in str(said.value)
    assert toys.same(before, toys.base_of(module.backbone))


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_callback_that_unfreezes_the_base_is_stopped_before_a_step_changes_it(way: str, tmp_path: Path) -> None:
    module = Adapted() if way == "mixin" else TransferLearning()
    before = toys.base_of(module.backbone)
    callbacks = [OwnCallback(), *([] if way == "mixin" else [LoRA(CONFIG)])]
    with pytest.raises(GuardError, match="4 frozen base weights were unfrozen after the adapters were made"):
        toys.fit(module, tmp_path, max_epochs=2, callbacks=callbacks)
    assert toys.same(before, toys.base_of(module.backbone))


def test_unfreezing_in_configure_optimizers_is_refused_as_its_checkpoint_would_not_load(tmp_path: Path) -> None:
    class Opens(Adapted):
        def configure_optimizers(self) -> Any:
            self.backbone.second.requires_grad_(True)
            return super().configure_optimizers()

    with pytest.raises(GuardError, match=r"2 frozen base weights were unfrozen .* backbone.second.weight"):
        toys.fit(Opens(), tmp_path)


def test_a_module_may_open_parts_by_hand_in_configure_model_and_its_checkpoint_loads(tmp_path: Path) -> None:
    class Opens(Adapted):
        def configure_model(self) -> None:
            self.apply_lora()
            self.backbone.second.bias.requires_grad_(True)

    module, resumed = Opens(), Opens()
    bias = module.backbone.second.bias.detach().clone()
    toys.fit(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert not torch.equal(bias, module.backbone.second.bias)
    toys.fit(resumed, tmp_path, tmp_path / "a.ckpt")
    assert toys.same(toys.snapshot(module), toys.snapshot(resumed))
