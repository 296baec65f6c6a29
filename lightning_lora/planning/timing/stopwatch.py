"""A callback that times the parts of training: micro-batches, optimizer steps, and batches of validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.planning.timing.shapes import Shape, shape_of

WARM_UP = 2
"""Batches that are not counted: the first ones make buffers, choose kernels and start workers."""


@dataclass
class Stopwatch(Callback):
    """Times micro-batches with reading them, optimizer steps, and the batches of the sanity check of validation.

    Args:
        count: Micro-batches to time, after two that are not counted.
        max_seconds: No micro-batch is begun after so many seconds; two are always timed.

    Attributes:
        micro: Seconds of each micro-batch: reading, forward and backward.
        optimizer: Seconds of each optimizer step: clipping, the step, gradients set to None.
        validation: Seconds and shape of each validation batch.
    """

    count: int
    max_seconds: float
    clock: Callable[[], float]
    micro: list[float] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    validation: list[tuple[float, Shape]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = self._mark = self._away = self._since = 0.0
        self._step: float | None = None
        self._done = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = self._mark = self._now(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the shape of the batch."""
        self._shape = shape_of(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note where backward ends; with several optimizers the first one counts."""
        if self._step is None:
            self._step = self._now(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a micro-batch, and stop after enough."""
        now = self._now(pl_module)
        in_step = 0.0 if self._step is None else now - self._step
        self._done += 1
        if self._done > WARM_UP:
            self.micro.append(now - self._mark - self._away - in_step)
            self.shapes.append(self._shape)
            self.optimizer.append(in_step)
        self._mark, self._away, self._step = now, 0.0, None
        is_late = now - self._begun > self.max_seconds and len(self.micro) >= 2
        trainer.should_stop = len(self.micro) >= self.count or is_late

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when validation begins."""
        self._since = self._now(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the time of a micro-batch."""
        self._away += self._now(pl_module) - self._since

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note when a validation batch begins."""
        self._batch_since = self._now(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record a validation batch of the sanity check."""
        if trainer.sanity_checking:
            self.validation.append((self._now(pl_module) - self._batch_since, shape_of(batch)))

    def _now(self, module: LightningModule) -> float:
        if module.device.type != "cpu":
            torch.accelerator.synchronize()
        return self.clock()
