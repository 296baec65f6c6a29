"""Parameter groups follow the learning-rate rule, and a run whose optimizer misses an adapter is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora import ConfigError, GuardError, LoRAConfig, LoRAMixin
from tests.support import toys
from tests.support.toys import Net, Toy, fit

pytestmark = toys.expected_warnings


def test_parameter_groups_follow_the_learning_rate_rule() -> None:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"], lr_multiplier=5)
    module.apply_lora()
    adapters, full = module.lora_parameter_groups(0.1)
    assert (adapters["lr"], adapters["weight_decay"], len(adapters["params"])) == (0.5, 0.0, 2)
    assert (full["lr"], len(full["params"])) == (0.1, 2)
    module = Toy()
    module.lora = None
    assert [len(group["params"]) for group in module.lora_parameter_groups(0.1)] == [4]


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf"), "1e-3", True, None])
def test_learning_rate_must_be_a_positive_number(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate must be a finite number greater than 0, got"):
        Toy().lora_parameter_groups(rate)


def test_optimizer_built_before_injection_is_refused(tmp_path: Path) -> None:
    class Early(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())

        def configure_optimizers(self) -> Any:
            return self.optimizer

    with pytest.raises(GuardError, match=r"4 of 4 trainable parameters are in no optimizer.*net.first.lora_A"):
        fit(Early(), tmp_path)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_no_optimizer_is_refused(tmp_path: Path) -> None:
    class Forgetful(Toy):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(GuardError, match="are in no optimizer and would not train"):
        fit(Forgetful(), tmp_path)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_missing_configure_optimizers_is_lightnings_own_error(lora: Any, tmp_path: Path) -> None:
    class Missing(LoRAMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__(lora=lora)
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum()

    with pytest.raises(MisconfigurationException, match="No `configure_optimizers\\(\\)` method defined"):
        fit(Missing(), tmp_path)


def test_everything_frozen_is_refused(tmp_path: Path) -> None:
    class Frozen(Toy):
        def on_fit_start(self) -> None:
            self.requires_grad_(False)

    with pytest.raises(GuardError, match="nothing would train: every parameter of Frozen is frozen"):
        fit(Frozen(), tmp_path)
