"""A monitor that measures every step and keeps the samples, and modules in double precision to compare them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import BatchSizeMonitor
from tests.support import toys


class Double(toys.Toy):
    """In float64, so that sums in another order agree to 1e-12."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.apply_lora()
        self.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([part.double() for part in batch], batch_idx)


class FrozenRate(Double):
    """Its weights do not move."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


class Tokens(TokenWeightedLoss, Double):
    """A loss summed over as many tokens as each row says."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, wanted = (part.double() for part in batch)
        mask = inputs > 0
        losses = (self.net(inputs) - wanted).square().sum(1) * mask.sum(1)
        return self.token_loss(losses.sum(), mask.sum())


class EveryStep(BatchSizeMonitor):
    """Measures every step from the first on."""

    warmup_steps = 0

    def __init__(self) -> None:
        super().__init__(every_n_steps=1)


class Samples(EveryStep):
    """Keeps every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[Any] = []

    def _take(self, trainer: Trainer, sample: Any, tokens: int | None) -> None:
        self.samples.append(sample)
        super()._take(trainer, sample, tokens)


def fit(folder: Path, rows: int, batch: int, accumulate: int, module: Any = None, **options: Any) -> Samples:
    """Train on ``rows`` rows in micro-batches of ``batch``, with a monitor that keeps every sample."""
    monitor = Samples()
    callbacks = [monitor, *options.pop("callbacks", [])]
    trainer = toys.trainer(folder, accumulate_grad_batches=accumulate, callbacks=callbacks, **options)
    trainer.fit(module or Double(), toys.loader(rows, batch))
    return monitor
