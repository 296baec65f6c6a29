"""The start of training prints the learning rate of the first step as it is, and what has changed it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedules

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRA
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings

ASKED = "0.001 x 10 = 0.01"


def lines(text: str) -> list[str]:
    return re.findall(r"learning rate .*", text)


class Scheduled(Toy):
    """An optimizer by the rule, and a scheduler that is made from it."""

    lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"])

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.first_rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 0:
            self.first_rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.lora_parameter_groups(1e-3), momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": "step"}}


SCHEDULERS: dict[str, Any] = {
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "CyclicLR": lambda o: schedules.CyclicLR(o, base_lr=0.0005, max_lr=0.05),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: step / 10),
    "LinearLR": lambda o: schedules.LinearLR(o, start_factor=0.25),
    "ConstantLR": lambda o: schedules.ConstantLR(o, factor=0.5),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.25), schedules.CosineAnnealingLR(o, 10)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.5), schedules.StepLR(o, 5)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_sets_the_rate_of_the_first_step_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Scheduled(SCHEDULERS[name])
    with caplog.at_level("INFO"):
        toys.fit(module, tmp_path)
    adapters, full = module.first_rates
    assert adapters != pytest.approx(0.01)
    assert lines(caplog.text) == [
        f"learning rate {adapters:g} at the start for 1 adapters: {name} set it in place of {ASKED}",
        f"learning rate {full:g} at the start for 2 parameters trained in full: {name} set it in place of 0.001",
    ]


@pytest.mark.parametrize("make", [lambda o: schedules.CosineAnnealingLR(o, 10), lambda o: schedules.StepLR(o, 1)])
def test_a_scheduler_that_starts_at_the_rate_of_the_rule_is_not_spoken_of(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        toys.fit(Scheduled(make), tmp_path)
    expected = [f"learning rate {ASKED} for 1 adapters", "learning rate 0.001 for 2 parameters trained in full"]
    assert lines(caplog.text) == expected


def test_without_a_trainer_the_rates_are_printed_when_the_groups_are_made(caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    module.apply_lora()
    with caplog.at_level("INFO"):
        AdamW(module.lora_parameter_groups(1e-3))
    assert lines(caplog.text) == [f"learning rate {ASKED} for 2 adapters"]


def test_without_lora_the_rate_of_the_whole_module_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Scheduled(SCHEDULERS["ConstantLR"])
    module.lora = None
    with caplog.at_level("INFO"):
        toys.fit(module, tmp_path)
    said = "learning rate 0.0005 at the start for 4 parameters trained in full: ConstantLR set it in place of 0.001"
    assert lines(caplog.text) == [said]


def test_an_optimizer_of_the_modules_own_has_its_rates_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Warm(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = schedules.LambdaLR(optimizer, lambda step: (step + 1) / 4)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with caplog.at_level("INFO"):
        toys.fit(Plain(), tmp_path, callbacks=[LoRA(LoRAConfig(rank=2))])
        toys.fit(Warm(), tmp_path, callbacks=[LoRA(LoRAConfig(rank=2))])
        toys.fit(Plain(), tmp_path)
    assert lines(caplog.text) == [
        "learning rate 0.05 for 2 adapters",
        "learning rate 0.0125 at the start for 2 adapters: LambdaLR set it in place of 0.05",
    ]


def test_a_resumed_run_prints_the_rate_it_goes_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def module() -> Scheduled:
        return Scheduled(lambda o: schedules.StepLR(o, 1, gamma=0.5))

    toys.fit(module(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    caplog.clear()
    with caplog.at_level("INFO"):
        toys.fit(module(), tmp_path, tmp_path / "a.ckpt", max_epochs=2)
    assert lines(caplog.text)[0] == (
        f"learning rate 0.000625 at the start for 1 adapters: StepLR set it in place of {ASKED}"
    )
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] == (
        pytest.approx(0.000625)
    )
