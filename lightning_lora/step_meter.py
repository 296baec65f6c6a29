"""Samples of the noise scale from the steps of a Trainer, on whatever strategy, without touching the module."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed import ProcessGroup

from lightning_lora.errors import ConfigError
from lightning_lora.micro_gradients import LeafGradients, MicroGradients, ShardedGradients, StepSample
from lightning_lora.strategies import FSDP2Strategy
from lightning_lora.token_loss import TokenWeightedLoss


class StepMeter:
    """Follows the micro-batches of measured steps.

    Args:
        trainer: With its optimizers.
        module: The module it trains.

    Raises:
        ConfigError: If this strategy or setting leaves nothing to measure, saying what would.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"one optimizer is needed to know what belongs to a step, there are {len(trainer.optimizers)}."
            )
        self.trainer, self.module = trainer, module
        self.source = _source(trainer)
        self.is_open = False
        self._defer_gradients: bool | None = None

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.source.num_ranks

    def can_start(self, batch_idx: int) -> bool:
        """Whether a step begins with this batch."""
        return not self.module.automatic_optimization or batch_idx % self.trainer.accumulate_grad_batches == 0

    def start(self) -> None:
        """Measure the step that begins."""
        self.source.start()
        self.is_open = True
        # There is nothing to see of gradients that stay where they are until the last micro-batch.
        if isinstance(strategy := self.trainer.strategy, FSDP2Strategy):
            self._defer_gradients, strategy.defer_gradients = strategy.defer_gradients, False

    def add(self, num_rows: int) -> None:
        """Note a micro-batch after its backward pass."""
        if not num_rows:
            raise ConfigError("the batch holds no tensor to count rows by.")
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.source.add(num_rows, 1.0 if scaler is None else scaler.get_scale())

    def finish(self) -> StepSample | None:
        """The sample of the step; gradients are unscaled, not yet clipped. None if there are no two micro-batches."""
        self._close()
        is_sum = isinstance(self.module, TokenWeightedLoss)
        return self.source.finish(weighted_by_rows=is_sum, unit=self._unit())

    def stop(self) -> None:
        """Measure no more of this step."""
        self._close()
        self.source.stop()

    def _close(self) -> None:
        if self.is_open and isinstance(strategy := self.trainer.strategy, FSDP2Strategy):
            strategy.defer_gradients = self._defer_gradients
        self.is_open = False

    def _unit(self) -> float:
        if isinstance(self.module, TokenWeightedLoss):
            return self.module.gradient_factor()
        # Lightning divides by the accumulation that was asked for, also in a short last window.
        asked = self.trainer.accumulate_grad_batches if self.module.automatic_optimization else self.source.num_added
        return asked / self.source.num_added


def _source(trainer: Trainer) -> MicroGradients:
    strategy = trainer.strategy
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise ConfigError("gradients of tensor-parallel layers are not measured.")
        if trainer.accumulate_grad_batches < 2:
            raise ConfigError(
                "under FSDP2 a step needs accumulate_grad_batches of 2 at least: its ranks are one micro-batch."
            )
        return ShardedGradients(parameters, mesh["data_parallel"].get_group())
    if type(strategy) is SingleDeviceStrategy or isinstance(strategy, DDPStrategy):
        group: ProcessGroup | None = torch.distributed.group.WORLD if trainer.world_size > 1 else None
        if trainer.accumulate_grad_batches * trainer.world_size < 2:
            raise ConfigError(
                "a step of one micro-batch has nothing to compare: halve the batch, accumulate_grad_batches=2."
            )
        return LeafGradients(parameters, group)
    raise ConfigError(f"{type(strategy).__name__} shows no gradients of micro-batches.")
