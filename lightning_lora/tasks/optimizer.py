"""The optimizer of a task, and the course of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lora.errors import TaskSettingError, check_choice, check_count
from lightning_lora.mixin.optim import check_learning_rate

SCHEDULES = ("constant", "linear", "cosine")


def check_optimizer(learning_rate: Any, weight_decay: Any, warmup_steps: Any, schedule: Any) -> None:
    """Refuse values of the settings of `PretrainedTask` that are about its optimizer.

    Raises:
        ConfigError: If one is of another type, out of range or unknown.
    """
    check_learning_rate(learning_rate)
    if not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < math.inf:
        raise TaskSettingError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}.")
    check_count("warmup_steps", warmup_steps, TaskSettingError, least=0)
    check_choice("schedule", schedule, SCHEDULES)


def adamw(groups: list[dict[str, Any]], learning_rate: float, weight_decay: float, trainer: Trainer) -> Optimizer:
    """AdamW for the parameter groups of the learning-rate rule, fused where Lightning can clip its gradients.

    Args:
        groups: The parameter groups.
        learning_rate: The rate of full fine-tuning.
        weight_decay: Weight decay of groups that set none.
        trainer: The Trainer, which tells the precision.
    """
    if weight_decay and all("weight_decay" in group for group in groups):
        rank_zero_warn(
            f"weight_decay={weight_decay:g} has no effect: adapters get none, and nothing beside them is trained."
        )
    # A fused step unscales gradients itself, which Lightning cannot combine with clipping.
    fused = trainer.precision != "16-mixed"
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)


def with_schedule(optimizer: Optimizer, schedule: str, warmup_steps: int, trainer: Trainer) -> Any:
    """What ``configure_optimizers`` returns for an optimizer with one of `SCHEDULES`.

    Args:
        optimizer: The optimizer.
        schedule: One of `SCHEDULES`, after the warm-up.
        warmup_steps: Optimizer steps over which the rate rises from 0.
        trainer: The Trainer, which tells the number of steps.

    Raises:
        ConfigError: If the schedule needs a number of steps and the data has none.
    """
    if schedule == "constant" and not warmup_steps:
        return optimizer
    steps = trainer.estimated_stepping_batches
    if steps == -1:  # what Lightning says of epochs without a length
        steps = math.inf
    if steps == math.inf and schedule != "constant":
        raise TaskSettingError(
            f"schedule={schedule!r} needs the number of steps, and a stream does not tell: set "
            "trainer.max_steps, or schedule='constant'."
        )
    if warmup_steps >= steps:
        rank_zero_warn(f"warmup_steps={warmup_steps}, but the run has {steps} steps: it never leaves warm-up.")
    name = "constant_with_warmup" if schedule == "constant" else schedule
    from transformers import get_scheduler  # imports torchao, bitsandbytes and peft: not for `fit --help`

    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)  # type: ignore[arg-type]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
