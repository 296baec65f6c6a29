"""What a plan refuses before anything is read or traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.callbacks.target_batch_size import TargetBatchSize
from lightning_lora.errors import PlanError


def check_objects(model: Any, datamodule: Any) -> None:
    """Refuse what cannot be planned before anything is read."""
    if not isinstance(model, (LightningModule, str)):
        raise PlanError(f"model must be a LightningModule, a folder or a hub name, got {type(model).__name__}.")
    if not isinstance(datamodule, (LightningDataModule, str)):
        raise PlanError(
            f"datamodule must be a LightningDataModule, a file, a glob or a hub name, got {type(datamodule).__name__}."
        )
    if isinstance(model, LightningModule) and not model.automatic_optimization:
        raise PlanError(f"{type(model).__name__} steps by itself (manual optimization): its step cannot be traced.")
    if isinstance(datamodule, LightningDataModule) and not is_overridden("train_dataloader", datamodule):
        raise PlanError(f"{type(datamodule).__name__} has no train_dataloader(): there is no training to plan.")


def check_trainer(trainer: Any, config: Any) -> None:
    """Refuse settings that are no mappings."""
    for name, value in (("trainer", trainer), ("config", config)):
        if value is not None and not isinstance(value, Mapping):
            raise PlanError(
                f"{name} must be a mapping of settings, such as {{'max_epochs': 3}}, got {type(value).__name__}."
                if name == "trainer"
                else f"config must be a mapping with model, data and trainer, got {type(value).__name__}."
            )


def check_target(rows: Any, trainer: Mapping[str, Any]) -> None:
    """Refuse rows of a step that are no number of rows, or that contradict the accumulation."""
    TargetBatchSize(rows)
    accumulation = trainer.get("accumulate_grad_batches")
    if accumulation not in (None, 1):
        raise PlanError(
            f"target_batch_size={rows} chooses trainer.accumulate_grad_batches, which is {accumulation} already: give "
            f"one of the two."
        )
