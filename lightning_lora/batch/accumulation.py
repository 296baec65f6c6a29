"""Changing the gradient accumulation of a Trainer while it runs, without a stale gradient or a schedule gone astray."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_lora.errors import ConfigError

LRRule = Literal["sqrt", "none"]


def may_switch(batch_idx: int, old: int, new: int) -> bool:
    """Whether accumulation may change from ``old`` to ``new`` before the batch ``batch_idx`` of an epoch.

    Lightning empties gradients where ``batch_idx % accumulation == 0`` and steps ``accumulation`` batches on: a window
    must have ended under the old number and begin under the new one, or gradients of the step before enter the next.
    """
    return batch_idx % old == 0 and batch_idx % new == 0


def steps_left(trainer: Trainer, batch_idx: int, accumulation: int) -> float:
    """Optimizer steps from the batch ``batch_idx`` of this epoch to the end of the run; infinity without one."""
    batches = trainer.num_training_batches
    assert trainer.max_epochs is not None
    by_epochs = math.inf
    if trainer.max_epochs != -1 and batches != math.inf:
        whole = trainer.max_epochs - trainer.current_epoch - 1
        by_epochs = math.ceil((batches - batch_idx) / accumulation) + whole * math.ceil(batches / accumulation)
    by_steps = trainer.max_steps - trainer.global_step if trainer.max_steps != -1 else math.inf
    return min(by_epochs, by_steps)


def fit_to_batch(group: dict[str, Any], before: float, after: float) -> None:
    r"""Change a group of Adam's parameters from one batch to another.

    The learning rate is multiplied by ``sqrt(after / before)`` (Malladi et al. 2022, https://arxiv.org/abs/2205.10287).
    For a batch ``r < 1`` times the first, ``beta2 ** r`` keeps the half-life of the second moment in rows (Marek et al.
    2025, https://arxiv.org/abs/2507.07101). For larger ones ``beta2`` stays: 0.95 would become 0.81 at four times the
    batch, below ``beta1``, and steps would be noisy by that alone (measured in ``benchmarks/batch_probe.py``).

    Args:
        group: Of an optimizer; changed.
        before: The batch it is set for, as a multiple of the one the run started with.
        after: The batch it shall be set for, likewise.
    """
    for key in ("lr", "initial_lr"):
        if key in group:
            group[key] *= math.sqrt(after / before)
    if "betas" in group:
        beta1, beta2 = group["betas"]
        group["betas"] = (beta1, beta2 ** (min(after, 1.0) / min(before, 1.0)))


def rescale_rates(trainer: Trainer, before: float, after: float, rule: LRRule) -> float:
    """Fit all optimizers and their schedules to another batch by `fit_to_batch`; the factor of the learning rates."""
    if rule == "none":
        return 1.0
    for group in _groups(trainer.optimizers):
        fit_to_batch(group, before, after)
    root = math.sqrt(after / before)
    for scheduler in step_schedulers(trainer):
        scheduler.base_lrs = [rate * root for rate in scheduler.base_lrs]
    return root


def step_schedulers(trainer: Trainer) -> list[LambdaLR]:
    """Schedulers that count optimizer steps.

    Raises:
        ConfigError: If one of them cannot go on from a fraction of a step.
    """
    found = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    for config in found:
        if not isinstance(config.scheduler, LambdaLR) or config.frequency != 1:
            raise ConfigError(
                f"{type(config.scheduler).__name__} cannot be stretched when accumulation changes the number of steps: "
                f"use a LambdaLR of frequency 1 (transformers' get_scheduler gives one), or interval='epoch'."
            )
    return [config.scheduler for config in found]  # pyright: ignore[reportReturnType]


class Horizon:
    """Keeps schedules as long as the run: they were planned for another number of steps.

    Args:
        planned: Optimizer steps of the whole run when the schedules were made.
    """

    def __init__(self, planned: float) -> None:
        self.planned = planned
        self.pace = 1.0
        self.is_stale = False

    def go_on(self, trainer: Trainer, planned: float, pace: float, ratio: float) -> None:
        """Continue schedules of an interrupted run, which were planned for ``planned`` steps.

        Args:
            trainer: Its schedules count as they did in that run.
            planned: Steps of that run as planned.
            pace: Its pace.
            ratio: Rows of a planned step then over those now: a schedule made on half the devices is twice as long.
        """
        self.pace = pace
        if self.planned != planned:
            for scheduler in step_schedulers(trainer):
                scheduler.last_epoch *= ratio  # pyright: ignore[reportAttributeAccessIssue]
            self.is_stale = True

    def follow(self, trainer: Trainer, left: float) -> None:
        """Spread what the schedules have left over the ``left`` steps that will be done."""
        schedulers = step_schedulers(trainer)
        if schedulers and math.isfinite(self.planned) and math.isfinite(left) and left > 0:
            self.pace = (self.planned - schedulers[0].last_epoch) / left
        self.is_stale = False

    def before_step(self, trainer: Trainer) -> None:
        """Advance the schedules by what a step counts beyond the one they will count themselves."""
        for scheduler in step_schedulers(trainer):
            scheduler.last_epoch += self.pace - 1  # pyright: ignore[reportAttributeAccessIssue]


def _groups(optimizers: list[Optimizer]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
