"""A device that tells how much memory it has for a step, and on which batches of too many real rows do not fit."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora.memory import run_step
from lightning_lora.memory.room import Room
from lightning_lora.memory.step_trace import trace_step

TOKENS, WIDTH = 64, 16
"""Activations of few rows take more than weights, gradients and optimizer."""


class Rows(LightningDataModule):
    def __init__(self, batch_size: int = 16, tokens: int = TOKENS) -> None:
        super().__init__()
        self.batch_size, self.tokens = batch_size, tokens

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(32, self.tokens, WIDTH)), self.batch_size)


class Module(LightningModule):
    """Runs out of memory with more real rows than ``fits``."""

    tried: ClassVar[list[int]] = []
    """The rows of every real batch. It belongs to the class, for those of a module are restored after a trial."""

    def __init__(self, fits: int = 16) -> None:
        super().__init__()
        self.fits = fits
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        if not isinstance(loss, FakeTensor):
            self.tried.append(len(batch[0]))
            if len(batch[0]) > self.fits:
                raise torch.OutOfMemoryError(f"no room for {len(batch[0])} rows")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def bytes_of(rows: int, accumulation: int = 1, tokens: int = TOKENS) -> int:
    """What a step of `Module` takes."""
    batch = [torch.ones(rows, tokens, WIDTH)]
    return trace_step(Module(), batch, accumulate_grad_batches=accumulation).memory.total


def have(monkeypatch: pytest.MonkeyPatch, num_bytes: int, is_limit: bool = True) -> None:
    """Let every device have so many bytes for a step."""
    monkeypatch.setattr(run_step, "room_for_step", lambda device, held: Room(num_bytes, is_limit))
    Module.tried.clear()
