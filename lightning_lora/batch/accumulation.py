"""Changes gradient accumulation during a run: where it is safe, and what learning rates and schedules need then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from lightning_lora.errors import AccumulationError

LRRule = Literal["sqrt", "none"]


def may_switch(batch_idx: int, old: int, new: int) -> bool:
    """Whether accumulation may change from ``old`` to ``new`` before the batch ``batch_idx`` of an epoch.

    Lightning clears gradients where ``batch_idx % accumulation == 0`` and steps ``accumulation`` batches later. A
    window must end under the old number and begin under the new one, or gradients of one step leak into the next.
    """
    return batch_idx % old == 0 and batch_idx % new == 0


def steps_left(trainer: Trainer, batch_idx: int, accumulation: int) -> float:
    """Optimizer steps from the batch ``batch_idx`` of this epoch to the end of the run; infinity without an end."""
    batches = trainer.num_training_batches
    assert trainer.max_epochs is not None
    by_epochs = math.inf
    if trainer.max_epochs != -1 and batches != math.inf:
        whole = trainer.max_epochs - trainer.current_epoch - 1
        by_epochs = math.ceil((batches - batch_idx) / accumulation) + whole * math.ceil(batches / accumulation)
    by_steps = trainer.max_steps - trainer.global_step if trainer.max_steps != -1 else math.inf
    return min(by_epochs, by_steps)


def fit_to_batch(group: dict[str, Any], before: float, after: float) -> None:
    r"""Adjust a parameter group of Adam to another batch size.

    The learning rate is multiplied by ``sqrt(after / before)`` (Malladi et al. 2022, https://arxiv.org/abs/2205.10287).
    For a batch ``r < 1`` times the first, ``beta2 ** r`` keeps the half-life of the second moment in rows (Marek et al.
    2025, https://arxiv.org/abs/2507.07101). For a larger batch ``beta2`` stays: at four times the batch, 0.95 would
    become 0.81, below ``beta1``, which alone makes steps noisy (measured in ``benchmarks/batch_probe.py``).

    Args:
        group: One entry of ``optimizer.param_groups``; modified in place.
        before: The batch that the group is set for, as a multiple of the run's first batch.
        after: The batch to set it for, as a multiple of the run's first batch.
    """
    for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are those of OneCycleLR
        if key in group:
            group[key] *= math.sqrt(after / before)
    if "betas" in group:
        beta1, beta2 = group["betas"]
        group["betas"] = (beta1, beta2 ** (min(after, 1.0) / min(before, 1.0)))


def rescale_rates(trainer: Trainer, before: float, after: float, rule: LRRule) -> float:
    """Adjust all optimizers with `fit_to_batch`, and their schedulers; returns the factor of the learning rates."""
    if rule == "none":
        return 1.0
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            fit_to_batch(group, before, after)
    root = math.sqrt(after / before)
    for scheduler in (each for config in trainer.lr_scheduler_configs for each in _with_parts(config.scheduler)):
        for name in ("base_lrs", "max_lrs"):  # from which it may compute a rate anew, the second one in CyclicLR
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * root for rate in getattr(scheduler, name)])
    return root


def _with_parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)


def step_schedulers(trainer: Trainer) -> list[LambdaLR]:
    """The learning-rate schedulers that count optimizer steps.

    Raises:
        ConfigError: If one of them cannot continue from a fraction of a step.
    """
    found = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    for config in found:
        if not isinstance(config.scheduler, LambdaLR) or config.frequency != 1:
            raise AccumulationError(
                f"{type(config.scheduler).__name__} cannot be stretched when accumulation changes the number of steps: "
                f"use a LambdaLR of frequency 1 (transformers' get_scheduler gives one), or interval='epoch'."
            )
    return [config.scheduler for config in found]  # pyright: ignore[reportReturnType]


class StretchedSchedule:
    """Stretches step schedules that were planned for another number of steps, so that they end with the run.

    Args:
        planned: Optimizer steps of the whole run when the schedules were made.

    Attributes:
        planned_per_step: Planned steps that the schedules advance by in each optimizer step.
        is_stale: Whether `stretch` is needed before the next step.
    """

    def __init__(self, planned: float) -> None:
        self.planned = planned
        self.planned_per_step = 1.0
        self.is_stale = False

    def resume(self, trainer: Trainer, planned: float, planned_per_step: float, ratio: float) -> None:
        """Continue the schedules of an interrupted run.

        Args:
            trainer: The Trainer, whose schedulers hold the counts of that run.
            planned: Planned steps of that run.
            planned_per_step: Planned steps per optimizer step of that run.
            ratio: Rows of a planned step of that run over those of this run. A schedule made for half as many devices
                is twice as long.
        """
        self.planned_per_step = planned_per_step
        if self.planned != planned:
            for scheduler in step_schedulers(trainer):
                scheduler.last_epoch *= ratio  # pyright: ignore[reportAttributeAccessIssue]
            self.is_stale = True

    def stretch(self, trainer: Trainer, steps: float) -> None:
        """Spread the rest of the schedules over the ``steps`` that are left in the run."""
        schedulers = step_schedulers(trainer)
        if schedulers and math.isfinite(self.planned) and math.isfinite(steps) and steps > 0:
            self.planned_per_step = (self.planned - schedulers[0].last_epoch) / steps
        self.is_stale = False

    def advance(self, trainer: Trainer) -> None:
        """Advance the schedules before an optimizer step, by all but the one step that they count themselves."""
        for scheduler in step_schedulers(trainer):
            scheduler.last_epoch += self.planned_per_step - 1  # pyright: ignore[reportAttributeAccessIssue]
