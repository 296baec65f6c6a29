"""Chooses how a step is measured, by strategy and accumulation, or says why it cannot be measured."""

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
    SingleDeviceXLAStrategy,
    Strategy,
)
from torch import nn
from torch.distributed import ProcessGroup

from lightning_lora.batch.noise.frozen_weights import WeightSketches
from lightning_lora.batch.noise.micro_gradients import LeafGradients, Metric, MicroGradients
from lightning_lora.batch.noise.row_gradients import RowGradients
from lightning_lora.batch.noise.sharded_gradients import ShardedGradients
from lightning_lora.errors import ConfigError, MeasurementError


def sample_source(trainer: Trainer, module: LightningModule, metrics: Mapping[str, Metric]) -> MicroGradients:
    """The measurement that suits a run.

    Raises:
        ConfigError: If steps of this run cannot be measured; the message says what to change.
    """
    optimizer, strategy = trainer.optimizers[0], trainer.strategy
    if (reason := unsupported_strategy(strategy)) is not None:
        raise MeasurementError(reason)
    if getattr(trainer.precision_plugin, "scaler", None) is not None and _optimizer_handles_unscaling(optimizer):
        raise MeasurementError(
            f"{type(optimizer).__name__} unscales the gradients inside its step, where they cannot be measured: build "
            "it with fused=False, or train in bf16-mixed."
        )
    parameters = _trained_parameters(trainer)
    if isinstance(strategy, ModelParallelStrategy):
        _check_sharded(trainer, parameters)
        assert strategy.device_mesh is not None
        return ShardedGradients(parameters, strategy.device_mesh["data_parallel"].get_group(), metrics)
    if module.automatic_optimization and trainer.accumulate_grad_batches * trainer.world_size < 2:
        try:
            return RowGradients(module, parameters, metrics)
        except ConfigError as reason:
            raise MeasurementError(
                f"a step is one micro-batch, and its rows cannot be compared: {reason} Set accumulate_grad_batches=2 "
                "with half the batch."
            ) from None
    return LeafGradients(parameters, _all_ranks(trainer), metrics)


def weight_source(trainer: Trainer, module: LightningModule) -> WeightSketches:
    """The measurement of the frozen weights that suits a run.

    Raises:
        ConfigError: If they cannot be measured in this run.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise MeasurementError("layers are sharded, and so are the rows of a micro-batch: use DDP or one device.")
    if not module.automatic_optimization:
        raise MeasurementError("with manual optimization it is unknown which rows a backward pass belongs to.")
    return WeightSketches(module, _trained_parameters(trainer), _all_ranks(trainer))


def unsupported_strategy(strategy: Strategy) -> str | None:
    """Why steps cannot be measured under a strategy, or None."""
    if isinstance(strategy, FSDPStrategy):
        return "FSDP1 shards gradients before those of a micro-batch can be seen: use FSDP2Strategy or 'ddp'."
    if isinstance(strategy, DeepSpeedStrategy):
        return "DeepSpeed accumulates inside its engine and shows no gradient of a micro-batch: use strategy='ddp'."
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            return "gradients of tensor-parallel layers are not measured: set tensor_parallel_size=1."
        return None
    is_plain = isinstance(strategy, SingleDeviceStrategy) and not isinstance(strategy, SingleDeviceXLAStrategy)
    if is_plain or isinstance(strategy, DDPStrategy):
        return None
    return f"{type(strategy).__name__} is not known to show gradients of micro-batches: use one device or 'ddp'."


def _check_sharded(trainer: Trainer, parameters: list[nn.Parameter]) -> None:
    if trainer.accumulate_grad_batches < 2:
        raise MeasurementError(
            "under FSDP2 all ranks together are one micro-batch, so a step needs accumulate_grad_batches >= 2."
        )
    if narrow := {str(p.dtype) for p in parameters if p.dtype not in (torch.float32, torch.float64)}:
        raise MeasurementError(
            f"trained parameters are {', '.join(sorted(narrow))}: what a micro-batch adds to such gradients is "
            "mostly rounding. Train adapters in float32 (adapter_dtype), or remove the batch-size monitor."
        )


def _trained_parameters(trainer: Trainer) -> list[nn.Parameter]:
    return [p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad]


def _all_ranks(trainer: Trainer) -> ProcessGroup | None:
    return torch.distributed.group.WORLD if trainer.world_size > 1 else None
