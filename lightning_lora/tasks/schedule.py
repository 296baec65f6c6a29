"""The course of the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lora.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


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
        raise ConfigError(
            f"schedule={schedule!r} needs the number of steps, and a stream does not tell: set "
            "trainer.max_steps, or schedule='constant'."
        )
    if warmup_steps >= steps:
        rank_zero_warn(f"warmup_steps={warmup_steps}, but the run has {steps} steps: it never leaves warm-up.")
    name = "constant_with_warmup" if schedule == "constant" else schedule
    from transformers import get_scheduler  # imports torchao, bitsandbytes and peft: not for `fit --help`

    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)  # type: ignore[arg-type]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
