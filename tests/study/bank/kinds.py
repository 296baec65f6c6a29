"""Arms of any module: runs of it apart and side by side, and all that these leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.study.bank.bank import Arm as BankArm
from lightning_lora.study.bank.bank import ArmBank, ArmRun, Mode
from lightning_lora.study.bank.process_state import seed_all
from tests.support import tiny_models, toys

STEPS = 6


def rows(generator: torch.Generator) -> Tensor:
    return torch.randn(32, 8, generator=generator)


def sequences(generator: torch.Generator) -> Tensor:
    return torch.randn(32, 5, 8, generator=generator)


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=generator)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(1, tiny_models.VOCAB, (32, 6), generator=generator)


class Task(LoRAMixin):
    """Trains the adapters of a module on a target for each row.

    Args:
        build: Makes the module.
        lora: Its adapters.
        rate: Learning rate of full fine-tuning.
        inputs: Makes ``(rows, *)`` inputs from a generator.
    """

    lora_root = "model"

    def __init__(
        self, build: Callable[[], nn.Module], lora: Mapping[str, Any], rate: float, inputs: Callable[[Any], Tensor]
    ) -> None:
        super().__init__()
        self.model = build().train()
        self.lora = LoRAConfig(**lora)
        self.rate, self.inputs = rate, inputs
        self.losses: list[float] = []

    def outputs(self, x: Tensor) -> Tensor:
        found: Any = self.model(x)
        return getattr(found, "logits", found)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        rows = self.outputs(x).flatten(1)
        loss = (rows - y.repeat(1, -(-rows.shape[1] // y.shape[1]))[:, : rows.shape[1]]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        x = self.inputs(generator)
        y = torch.randn(len(x), 16, generator=generator)
        return DataLoader(TensorDataset(x, y), 4, shuffle=True, drop_last=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.lora_parameter_groups(self.rate), momentum=0.9)


@dataclass
class Arm:
    """An arm as plain settings."""

    lora: Mapping[str, Any]
    rate: float
    seed: int


# Small steps without Adam, which makes whole steps of gradients that are zero up to rounding.
TWO = {"a": Arm({"rank": 2}, 2e-3, 1), "b": Arm({"rank": 4}, 1e-3, 2)}


@dataclass
class Kind:
    """A kind of module, and what becomes of its arms in one batch.

    Args:
        build: Makes the module.
        inputs: Makes its inputs.
        why_turns: Part of the reason for which arms take turns; "" if they share batches.
        lora: Adapters of all arms, beside their ranks.
        task: The task that trains it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Any], Tensor]
    why_turns: str = ""
    lora: Mapping[str, Any] = field(default_factory=dict)
    task: type[Task] = Task
    arms: Mapping[str, Arm] = field(default_factory=lambda: TWO)

    def made(self, arm: Arm, folder: Path) -> tuple[Trainer, Task]:
        seed_all(11)
        task = self.task(self.build, {**arm.lora, **self.lora}, arm.rate, self.inputs)
        return toys.trainer(folder, max_steps=STEPS, max_epochs=-1), task

    def apart(self, folder: Path) -> dict[str, Task]:
        found = {}
        for name, arm in self.arms.items():
            trainer, task = self.made(arm, folder / name)
            seed_all(arm.seed)
            trainer.fit(task)
            found[name] = task
        return found

    def run(self, trainer: Trainer, task: Task) -> Callable[[BankArm], None]:
        """The run of an arm, for `ArmBank.run`."""

        def fit(arm: BankArm) -> None:
            trainer.callbacks.append(arm.callback)  # type: ignore[attr-defined]
            trainer.fit(task)

        return fit

    def side_by_side(self, folder: Path, mode: Mode) -> tuple[dict[str, Task], ArmBank]:
        """The same runs side by side, none of which may fail."""
        made = {name: self.made(arm, folder / name) for name, arm in self.arms.items()}
        bank = ArmBank(mode)
        runs = {name: ArmRun(trainer, task, seed=self.arms[name].seed) for name, (trainer, task) in made.items()}
        assert bank.fit(runs) == {}
        return {name: task for name, (_, task) in made.items()}, bank


def gap(found: Mapping[str, Task], expected: Mapping[str, Task]) -> float:
    """The largest difference of losses, parameters and buffers; infinite where one has what the other has not."""
    most = 0.0
    for name, one in found.items():
        other = expected[name]
        if len(one.losses) != len(other.losses) or not one.losses:
            return float("inf")
        most = max(most, *(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)))
        values, others = one.state_dict(), other.state_dict()
        if values.keys() != others.keys():
            return float("inf")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.numel():
                most = max(most, float((_plain(value) - _plain(others[key])).abs().max()))
    return most


def _plain(x: Tensor) -> Tensor:
    return (x.dequantize() if hasattr(x, "dequantize") and type(x) is not Tensor else x).detach().double()
