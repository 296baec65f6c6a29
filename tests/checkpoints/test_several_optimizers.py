"""Adapters in several optimizers, as in adversarial training: each keeps its own state, also when a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.callbacks import FiniteGradients, LoRA, LoRAGuard
from tests.support import toys
from tests.support.toys import Plain

pytestmark = toys.expected_warnings


class TwoSteps(toys.ByHand, Plain):
    """Steps two optimizers by hand that share the second layer: one without and one with the first."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        for number, optimizer in enumerate(self.optimizers()):  # pyright: ignore[reportArgumentType]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward((self(x) - y + number).square().mean())
            optimizer.step()
            self.inside(number)
            self.untoggle_optimizer(optimizer)

    def inside(self, number: int) -> None:
        """Do nothing while the parameters of the other optimizer are frozen."""

    def configure_optimizers(self) -> Any:
        second = [p for p in self.net.second.parameters() if p.requires_grad]
        first = [p for p in self.net.first.parameters() if p.requires_grad]
        return [torch.optim.Adam(second, lr=0.05), torch.optim.Adam([*first, *second], lr=0.02)]


class TwoStepsToy(LoRAMixin, TwoSteps):
    lora = LoRAConfig(rank=2)


def make(kind: str) -> tuple[LightningModule, list[Callback]]:
    others: list[Callback] = [LoRAGuard(), FiniteGradients()]
    return (TwoSteps(), [LoRA(LoRAConfig(rank=2)), *others]) if kind == "callback" else (TwoStepsToy(), others)


def moments(trainer: Trainer) -> list[Any]:
    return [[state["exp_avg"] for state in optimizer.state.values()] for optimizer in trainer.optimizers]


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_a_run_of_two_optimizers_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    runs = []
    for stops in (False, True):
        torch.manual_seed(0)
        module, callbacks = make(kind)
        trainer = toys.fit(module, tmp_path, callbacks=callbacks, max_epochs=1 if stops else 2)
        if stops:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            content = torch.load(tmp_path / "half.ckpt", weights_only=True)
            names = [list(state["state"]) for state in content["optimizer_states"]]
            second = ["net.second.lora_A", "net.second.lora_B"]
            assert names == [second, ["net.first.lora_A", "net.first.lora_B", *second]]
            module, callbacks = make(kind)
            trainer = toys.fit(module, tmp_path, tmp_path / "half.ckpt", callbacks=callbacks, max_epochs=2)
        assert all(toys.moved(module))
        runs.append((toys.snapshot(module), moments(trainer)))
    (whole, its_moments), (resumed, other_moments) = runs
    assert toys.same(whole, resumed)
    torch.testing.assert_close(its_moments, other_moments, rtol=0, atol=0)
    # The same parameters, with another state in each optimizer.
    assert not torch.equal(its_moments[0][0], its_moments[1][2])


def test_what_is_saved_while_an_optimizer_is_toggled_holds_every_adapter(tmp_path: Path) -> None:
    class Inside(TwoStepsToy):
        def inside(self, number: int) -> None:
            if number == 0:  # the first layer is frozen meanwhile
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    class Full(Inside):
        lora = LoRAConfig(rank=2, targets=["second"], trainable=["first"])

    for kind, names in ((Inside, 4), (Full, 4)):
        toys.fit(kind(), tmp_path)
        content = torch.load(tmp_path / "inside.ckpt", weights_only=True)
        assert len(content["state_dict"]) == len(content["lightning_lora"]["tensors"]) == names
        kind.load_from_checkpoint(tmp_path / "inside.ckpt", weights_only=True)


def test_parameters_outside_the_module_keep_their_own_state_in_every_group(tmp_path: Path) -> None:
    outside = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]

    class Odd(LoRAMixin, Plain):
        lora = LoRAConfig(rank=2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + outside[0].sum() + 3 * outside[1].sum()

        def configure_optimizers(self) -> Any:
            groups = [{"params": [outside[0]]}, {"params": [outside[1], *self.lora_parameter_groups(0.1)[0]["params"]]}]
            return torch.optim.Adam(groups, lr=0.05)

    trainer = toys.fit(Odd(), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (state,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"]
    assert [group["params"][0] for group in state["param_groups"]] == [0, 1]
    torch.testing.assert_close(state["state"][1]["exp_avg"], 3 * state["state"][0]["exp_avg"])
