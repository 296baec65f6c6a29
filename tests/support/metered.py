"""A callback that measures every step and keeps the samples, and gradients by autograd to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.batch.noise.step_meter import StepMeter
from lightning_lora.batch.noise.step_sample import StepSample
from tests.support import toys


class Metered(Callback):
    """Drives a `StepMeter`, and lets its errors reach the test."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.samples: list[dict[str, StepSample]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter = StepMeter(trainer, pl_module, **self.options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.num_rows = count_rows(batch)
        if not self.meter.is_open and self.meter.can_start(batch_idx):
            self.meter.start()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.add(self.num_rows)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.samples.append(self.meter.finish())


def measure(
    folder: Path, module: LightningModule, loader: Any, accumulate: int = 1, trainer: Any = None, **options: Any
) -> list[dict[str, StepSample]]:
    """Samples of every step of a run."""
    callback = Metered(**options)
    settings = {"accumulate_grad_batches": accumulate, "callbacks": [callback], **(trainer or {})}
    toys.trainer(folder, **settings).fit(module, loader)
    return callback.samples


def vector(tensors: Sequence[Tensor | None]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def gradients_of(module: Any, batches: Sequence[list[Tensor]]) -> Tensor:
    """``(K, D)``: the gradient of the training loss of each batch, at the weights as they are."""
    found = []
    for batch in batches:
        module.zero_grad()
        module.training_step(batch, 0).backward()
        found.append(vector([p.grad for p in module.parameters()]).double())
    module.zero_grad()
    return torch.stack(found)


def expected(gradients: Tensor, num_rows: int) -> Any:
    """The sample, up to rounding, of micro-batches of ``num_rows`` rows each."""
    import pytest

    signal, trace = signal_and_trace(gradients.square().sum(1), gradients.mean(0).square().sum(), num_rows)
    rows = num_rows * len(gradients)
    return pytest.approx((float(signal), float(trace), rows, len(gradients)), rel=1e-10)
