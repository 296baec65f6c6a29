"""Adapted layers that are never called are reported, and every layer gets its own methods back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora import GuardError, LoRAMixin, lora_layers
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.lora.layers.base import LoRALayer
from tests.callbacks.test_guard import CONFIG, fit, untouched
from tests.support import toys
from tests.support.toys import Net, Plain, Toy

pytestmark = toys.expected_warnings


class Bypass(nn.Module):
    """Computes with the weight of a layer without calling it, in training (True), evaluation (False) or both."""

    def __init__(self, *modes: bool) -> None:
        super().__init__()
        self.modes = modes
        self.layer = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bypassed = self.training in self.modes
        return self.out(F.linear(x, self.layer.weight, self.layer.bias) if bypassed else self.layer(x))


class Bypassing(LoRAMixin, Plain):
    lora = CONFIG

    def __init__(self, *modes: bool) -> None:
        super().__init__()
        self.net = Bypass(*modes)  # pyright: ignore[reportAttributeAccessIssue]


def test_bypassed_layer_in_training_is_named_after_patience(tmp_path: Path) -> None:
    module = Bypassing(True, False)
    with pytest.raises(GuardError, match=r"1 adapters took no part in training for 3 optimizer steps: net.layer\."):
        fit(module, tmp_path, LoRAGuard(patience=3))
    assert untouched(module)


def test_bypassed_layer_is_named_at_the_end_of_a_run_shorter_than_patience(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"1 adapters took no part in training: net.layer\. Something computes"):
        fit(Bypassing(True), tmp_path, LoRAGuard(patience=100))


@pytest.mark.parametrize("sanity", [0, 1])
def test_bypassed_layer_in_evaluation_is_named(sanity: int, tmp_path: Path) -> None:
    module = Bypassing(False)
    with pytest.raises(GuardError, match=r"1 adapters took no part in evaluation: net.layer\."):
        fit(module, tmp_path, validation=toys.loader(), num_sanity_val_steps=sanity)
    assert untouched(module)


def test_bypassed_layer_of_the_module_itself_is_named(tmp_path: Path) -> None:
    class Direct(LoRAMixin, LightningModule):
        lora = CONFIG

        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # The analysis of the source code does not see this use.
            weight = dict(self.named_parameters())["bypassed.weight"]
            return F.linear(self.used(batch[0]), weight).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with pytest.raises(GuardError, match=r"1 adapters took no part in training: bypassed"):
        fit(Direct(), tmp_path)


def test_layers_get_their_forward_back_after_an_exception(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no luck")

    module = Failing()
    with pytest.raises(ValueError, match="no luck"):
        fit(module, tmp_path)
    assert untouched(module)


def test_layers_get_their_forward_back_when_an_epoch_is_skipped(tmp_path: Path) -> None:
    class Skipping(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

    module = Skipping()
    fit(module, tmp_path, max_epochs=2, validation=toys.loader())
    assert untouched(module)


def test_a_forward_that_others_put_on_a_layer_is_kept(tmp_path: Path) -> None:
    # accelerate hooks layers like this.
    module = Toy()
    module.apply_lora()
    layer, called = module.net.first, []

    def hooked(x: Tensor) -> Tensor:
        called.append(True)
        return type(layer).forward(layer, x)

    layer.__dict__["forward"] = hooked
    fit(module, tmp_path)
    assert layer.__dict__["forward"] is hooked
    assert len(called) == 4


class Adversarial(toys.ByHand, LoRAMixin, LightningModule):
    """Two optimizers that take turns; evaluation runs one of the two networks."""

    lora = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Net(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]  # pyright: ignore[reportIndexIssue]
        loss = self.critic(batch[1]).mean() if batch_idx % 2 else self.generator(batch[0]).square().mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.generator(batch[0])

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.05) for net in (self.generator, self.critic)]


def test_manual_optimisation_with_two_optimizers_that_take_turns(tmp_path: Path) -> None:
    module = Adversarial()
    with pytest.warns(
        UserWarning, match=r"2 adapters took no part in evaluation: critic.0, critic.2\. That is right only"
    ):
        fit(module, tmp_path, max_epochs=4, validation=toys.loader())
    assert all(toys.moved(module))


def test_layers_in_a_list_belong_to_the_module_around_it(tmp_path: Path) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers
            assert isinstance(first, LoRALayer)
            return second(first(x) if self.training else F.linear(x, first.weight))

    module = Toy()
    module.net = Listed()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GuardError, match=r"1 adapters took no part in evaluation: net.layers.0\."):
        fit(module, tmp_path, validation=toys.loader())


def test_compiled_submodule(tmp_path: Path) -> None:
    class Compiled(Toy):
        def configure_model(self) -> None:
            if not isinstance(self.net, torch._dynamo.OptimizedModule):
                self.apply_lora()
                self.net = torch.compile(self.net, backend="eager", fullgraph=True)  # pyright: ignore

    module = Compiled()
    fit(module, tmp_path, max_epochs=2, validation=toys.loader())
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))
    assert untouched(module.net._orig_mod)  # pyright: ignore
