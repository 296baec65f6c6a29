"""Lightning's search for a learning rate (``Tuner.lr_find``, ``LearningRateFinder``) in terms of full fine-tuning.

Lightning gives every parameter group the same rate while it searches, and again when it has found one. Here groups of
adapters get ``lr_multiplier`` times it, as they will when the module makes its optimizer with the rate that was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.lightning_private import searching_schedule
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.class_swap import mix_in
from lightning_lora.mixin.multipliers import group_multiplier
from lightning_lora.mixin.rates import ASKED, report_groups
from lightning_lora.trainer_access import found


class _MultipliedRates(LRScheduler):
    """Multiplies the rates of another schedule, group by group."""

    multipliers: Sequence[float]

    def get_lr(self) -> list[Any]:
        return [rate * factor for rate, factor in zip(super().get_lr(), self.multipliers, strict=True)]


def sweep_in_full_terms(module: LightningModule) -> None:
    """Let a search that begins try multiplied rates on adapters, and remember that there was one."""
    schedule = searching_schedule(module.trainer)
    if schedule is None or isinstance(schedule, _MultipliedRates):
        return
    module.__dict__["_lora_rate_was_searched"] = True
    multiplied = mix_in(schedule, _MultipliedRates)
    multiplied.multipliers = _multipliers(module, schedule.optimizer)
    for group, factor in zip(schedule.optimizer.param_groups, multiplied.multipliers, strict=True):
        group["lr"] *= factor


def use_found_rate(module: LightningModule) -> None:
    """Multiply the rate that a finished search has given to all groups of the running optimizers.

    Schedules go on from it too; Lightning leaves them at the rates they were made with.
    """
    trainer = module.trainer
    if searching_schedule(trainer) is not None or not module.__dict__.pop("_lora_rate_was_searched", False):
        return
    rate = _found_rate(trainer)
    if rate is None:
        return
    for optimizer in trainer.optimizers:
        for group, factor in zip(optimizer.param_groups, _multipliers(module, optimizer), strict=True):
            group["lr"] = group[ASKED] = rate * factor
    if lora_layers(module):
        rank_zero_info(f"learning rate {rate:g} was found")
        report_groups(module, [group for optimizer in trainer.optimizers for group in optimizer.param_groups])
    for config in trainer.lr_scheduler_configs:
        _go_on_from_present_rates(config.scheduler)


def _found_rate(trainer: Trainer) -> float | None:
    """The rate that a search has found and given to all groups; None if it has not."""
    finder = found(trainer, LearningRateFinder)
    rate = finder.optimal_lr.suggestion() if finder is not None and finder.optimal_lr is not None else None
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return rate if all(group["lr"] == rate for group in groups) else None


def _multipliers(module: LightningModule, optimizer: Optimizer) -> list[float]:
    return [group_multiplier(module, group) for group in optimizer.param_groups]


def _go_on_from_present_rates(schedule: Any) -> None:
    """Make the rates of the optimizer the base of a schedule that has one, at its present place."""
    groups = schedule.optimizer.param_groups
    if not hasattr(schedule, "base_lrs"):
        return
    places = [
        last / base if base else 1.0 for last, base in zip(schedule.get_last_lr(), schedule.base_lrs, strict=True)
    ]
    schedule.base_lrs = [group["lr"] for group in groups]
    for group, place in zip(groups, places, strict=True):
        group["initial_lr"] = group["lr"]
        group["lr"] *= place
