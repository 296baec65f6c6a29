"""Optimizer state by parameter name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.errors import AdapterFileError
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import toys

pytestmark = toys.expected_warnings


class Ordered(LoRAMixin, toys.Plain):
    """A module for full fine-tuning whose optimizer gets the parameters in the order ``order``."""

    order = (0, 1, 2, 3)
    groups = ((0, 4),)

    def __init__(self) -> None:
        super().__init__()
        # Both have the same shapes, so that only the order distinguishes them.
        self.net.first, self.net.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        ordered = [parameters[place] for place in self.order]
        return torch.optim.Adam([{"params": ordered[first:last]} for first, last in self.groups], lr=0.05)


class Reversed(Ordered):
    order = (2, 3, 0, 1)


class Halved(Ordered):
    groups = ((0, 2), (2, 4))


class HalvedReversed(Halved):
    order = (2, 3, 0, 1)


def moments(module: LoRAMixin) -> dict[str, torch.Tensor]:
    optimizer: Any = module.trainer.optimizers[0]
    return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in module.named_parameters()}


def saved(kind: type[Ordered], folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = kind()
    trainer = toys.trainer(folder)
    trainer.fit(module, toys.loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", moments(module)


def test_state_is_keyed_by_name_without_adapters_too(tmp_path: Path) -> None:
    path, _ = saved(Reversed, tmp_path)
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    names = ["net.second.weight", "net.second.bias", "net.first.weight", "net.first.bias"]
    assert list(state["state"]) == state["param_groups"][0]["params"] == names


def test_state_follows_the_names_into_an_optimizer_of_another_order(tmp_path: Path) -> None:
    path, before = saved(Ordered, tmp_path)
    resumed = Reversed()
    # No step is left to take.
    toys.trainer(tmp_path).fit(resumed, toys.loader(), ckpt_path=path)
    assert toys.same(moments(resumed), before)


def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    path, _ = saved(Halved, tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"group 0 .* other parameters than in the checkpoint \(net.first.bias, "
    ):
        toys.trainer(tmp_path).fit(HalvedReversed(), toys.loader(), ckpt_path=path)
