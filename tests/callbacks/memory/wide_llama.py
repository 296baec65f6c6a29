"""Runs of a wide llama on a device that tells its memory, and what a step takes with each choice."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_lora import LoRAConfig, StepMemory
from lightning_lora.callbacks import MemoryChoice
from lightning_lora.callbacks.memory import memory_choice
from lightning_lora.memory.candidates import candidates
from lightning_lora.memory.room import Room
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.tasks.conftest import token_loader

OPEN = StepMemory()


def have(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the device be one that tells how much memory it has for a step."""
    monkeypatch.setattr(memory_choice, "_room", lambda *_: Room(num_bytes, is_limit=True))


class Watched(CausalLM):
    """Keeps the losses and gradients of its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not isinstance(loss, FakeTensor):
            self.seen.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        if not isinstance(next(self.parameters()), FakeTensor):
            self.seen += [p.grad.clone() for p in self.parameters() if p.grad is not None]


def made(folder: Path, **options: Any) -> Watched:
    return Watched(str(folder), 1e-3, **({"lora": LoRAConfig(rank=2)} | options))


def fit(module: Any, where: Path, loader: Any = None, **options: Any) -> tuple[MemoryChoice, Trainer]:
    callback, ckpt_path = MemoryChoice(), options.pop("ckpt_path", None)
    more = options.pop("callbacks", [])
    trainer = toys.trainer(where, callbacks=[callback, *more], **({"max_epochs": 1} | options))
    trainer.fit(module, loader or token_loader(8, 16), ckpt_path=ckpt_path, weights_only=True)
    return callback, trainer


@functools.cache
def bytes_of(folder: Path) -> list[int]:
    """What a step of 8 rows takes with each candidate."""
    batch = next(iter(token_loader(8)))
    ways = candidates(OPEN, CausalLM.step_memory_choices)
    return [trace_step(made(folder, step_memory=each), batch).memory.total for each in ways]


def ways() -> list[StepMemory]:
    """The candidates of a task."""
    return candidates(OPEN, CausalLM.step_memory_choices)
