"""Where the samples of a measured step come from, by strategy and accumulation, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.distributed import ProcessGroup

from lightning_lora.batch.noise.frozen_weights import WeightSketches
from lightning_lora.batch.noise.micro_gradients import LeafGradients, Metric, MicroGradients
from lightning_lora.batch.noise.row_samples import RowGradients
from lightning_lora.batch.noise.sharded_gradients import ShardedGradients
from lightning_lora.errors import ConfigError


def sample_source(trainer: Trainer, module: LightningModule, metrics: Mapping[str, Metric]) -> MicroGradients:
    """What measures the steps of this run.

    Args:
        trainer: With its one optimizer.
        module: The module it trains.
        metrics: Measures to take beside the gradient itself.

    Raises:
        ConfigError: If nothing can, saying what to change.
    """
    if (reason := refusal(trainer.strategy)) is not None:
        raise ConfigError(reason)
    optimizer, strategy = trainer.optimizers[0], trainer.strategy
    if getattr(trainer.precision_plugin, "scaler", None) is not None and _optimizer_handles_unscaling(optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__} unscales the gradients inside its step, after anybody could measure them: "
            "build it with fused=False, or train in bf16-mixed."
        )
    parameters = _trained(trainer)
    if isinstance(strategy, ModelParallelStrategy):
        if trainer.accumulate_grad_batches < 2:
            raise ConfigError(
                "under FSDP2 a step needs accumulate_grad_batches of 2 at least: its ranks are one micro-batch."
            )
        assert strategy.device_mesh is not None
        return ShardedGradients(parameters, strategy.device_mesh["data_parallel"].get_group(), metrics)
    is_counted = module.automatic_optimization
    if is_counted and trainer.accumulate_grad_batches * trainer.world_size < 2:
        try:
            return RowGradients(module, parameters, metrics)
        except ConfigError as reason:
            raise ConfigError(
                f"a step is one micro-batch, and its rows cannot be compared: {reason} Set accumulate_grad_batches=2 "
                "with half the batch."
            ) from None
    return LeafGradients(parameters, _ranks(trainer), metrics)


def weight_source(trainer: Trainer, module: LightningModule) -> WeightSketches:
    """What measures the frozen weights of this run.

    Raises:
        ConfigError: If nothing can.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigError("layers are sharded, and the rows of a micro-batch on several ranks; use DDP or one device.")
    if not module.automatic_optimization:
        raise ConfigError("with manual optimisation nobody knows which rows a backward pass is about.")
    return WeightSketches(module, _trained(trainer), _ranks(trainer))


def refusal(strategy: Strategy) -> str | None:
    """Why steps cannot be measured under a strategy, or None."""
    if isinstance(strategy, FSDPStrategy):
        return "FSDP1 shards gradients before anybody sees those of a micro-batch: use FSDP2Strategy or 'ddp'."
    if isinstance(strategy, DeepSpeedStrategy):
        return "DeepSpeed accumulates inside its engine and shows no gradient of a micro-batch: use strategy='ddp'."
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            return "gradients of tensor-parallel layers are not measured: set tensor_parallel_size=1."
        return None
    if type(strategy) is SingleDeviceStrategy or isinstance(strategy, DDPStrategy):
        return None
    return f"{type(strategy).__name__} is not known to show gradients of micro-batches: use one device or 'ddp'."


def _trained(trainer: Trainer) -> list[nn.Parameter]:
    return [p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad]


def _ranks(trainer: Trainer) -> ProcessGroup | None:
    return torch.distributed.group.WORLD if trainer.world_size > 1 else None
