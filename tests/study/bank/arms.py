"""Arms of a small language model: three that differ in rank, rate and order, and their runs apart and side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import FiniteGradients
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.study.bank.bank import ArmBank, ArmRun, Mode
from lightning_lora.study.bank.process_state import seed_all
from lightning_lora.tasks import CausalLM
from tests.support import tiny_models, toys

STEPS = 8


def model_folder(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    settings = {"hidden_size": 64, **settings}  # rank 32 in all layers
    model: Any = tiny_models.llama(**settings)
    model.to(dtype).save_pretrained(folder)
    return folder


class Rows(LightningDataModule):
    """Rows of random tokens of different lengths, padded in batches; the order follows the global random numbers."""

    def __init__(self, batch_size: int = 3, longest: int = 14) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(6, longest + 1, (96,), generator=generator).tolist()
        self.rows = [torch.randint(3, tiny_models.VOCAB, (n,), generator=generator) for n in lengths]

    @staticmethod
    def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = padded.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size, shuffle=True, collate_fn=self.collate)  # type: ignore[arg-type]


class Losses(Callback):
    """Keeps what each micro-batch logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


class Spoiled(CausalLM):
    """A task whose loss is NaN at optimizer step 5."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 5 else loss


@dataclass
class Setting:
    """An arm as plain settings, so that it can be made twice."""

    rank: int
    rate: float
    seed: int
    kind: type[CausalLM] = CausalLM
    lora: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def make(self, model: Path, folder: Path) -> tuple[Trainer, CausalLM, Rows, Losses]:
        settings = {"max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05, **self.trainer}
        losses = Losses()
        callbacks: list[Callback] = [losses, FiniteGradients()]
        trainer = toys.trainer(folder, callbacks=callbacks, **settings)
        task = {"schedule": "cosine", "warmup_steps": 2, **self.task}
        module = self.kind(str(model), self.rate, LoRAConfig(rank=self.rank, **self.lora), **task)
        return trainer, module, Rows(**self.data), losses


THREE = {
    "one": Setting(1, 2e-4, seed=1),
    "eight": Setting(8, 1e-3, seed=2, trainer={"gradient_clip_val": 0.02}),
    # Not clipped: clipping would hide a gradient that is a multiple of its own.
    "thirty-two": Setting(32, 5e-4, seed=3, trainer={"gradient_clip_val": None}),
}


@dataclass
class Trained:
    """What a run leaves."""

    module: CausalLM
    losses: list[float]
    error: Exception | None = None

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: factor.detach() for name, factor in factor_parameters(self.module).items()}


def apart(settings: Mapping[str, Setting], model: Path, folder: Path) -> dict[str, Trained]:
    """Runs of their own."""
    found = {}
    for name, setting in settings.items():
        seed_all(setting.seed)
        trainer, module, data, losses = setting.make(model, folder / name)
        error = None
        seed_all(setting.seed)
        try:
            trainer.fit(module, data)
        except Exception as raised:
            error = raised
        found[name] = Trained(module, losses.losses, error)
    return found


def side_by_side(
    settings: Mapping[str, Setting], model: Path, folder: Path, mode: Mode
) -> tuple[dict[str, Trained], ArmBank]:
    """The same runs in one process on one base."""
    made = {name: setting.make(model, folder / name) for name, setting in settings.items()}
    bank = ArmBank(mode)
    failed = bank.fit(
        {name: ArmRun(trainer, module, data, settings[name].seed) for name, (trainer, module, data, _) in made.items()}
    )
    return {name: Trained(one[1], one[3].losses, failed.get(name)) for name, one in made.items()}, bank


def gap(one: Trained, other: Trained) -> float:
    """The largest difference of losses and of factors."""
    assert one.error is other.error is None
    assert len(one.losses) == len(other.losses) > 0
    losses = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    assert one.factors.keys() == other.factors.keys()
    return max(losses, *(float((one.factors[name] - other.factors[name]).abs().max()) for name in one.factors))
