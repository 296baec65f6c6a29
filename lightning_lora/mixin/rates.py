"""The learning rates of a run as its start finds them: schedulers may have changed what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.lightning_private import searching_schedule
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.multipliers import group_multiplier

ASKED = "asked_lr"
"""Key of a parameter group: the learning rate that `parameter_groups` has given it."""


def report_groups(module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Print the learning rates of ``groups``, which no scheduler has seen."""
    for group in groups:
        rank_zero_info(f"learning rate {_asked(module, group)} for {_contents(module, group['params'])}")


def report_rates(module: nn.Module, trainer: Trainer) -> None:
    """Print the learning rate of the next step for each parameter group, and what has changed it.

    While Lightning searches for a rate there is nothing to print.
    """
    if searching_schedule(trainer) is not None:
        return
    for optimizer in trainer.optimizers:
        for group, parameters in _groups(optimizer):
            contents = _contents(module, parameters)
            asked = group.get(ASKED)
            if not contents or (asked is None and not lora_layers(module)):
                continue
            if asked is None:
                asked = group.get("initial_lr", group["lr"])
            said = _asked(module, group) if ASKED in group else f"{float(asked):g}"
            if float(group["lr"]) == float(asked):
                rank_zero_info(f"learning rate {said} for {contents}")
                continue
            changed_by = ", ".join(_schedulers(trainer, optimizer)) or "something after configure_optimizers"
            rank_zero_info(
                f"learning rate {float(group['lr']):g} at the start for {contents}: {changed_by} set it in place of "
                f"{said}"
            )


def _asked(module: nn.Module, group: dict[str, Any]) -> str:
    """The rate that was asked for, with the rule that made it: ``2e-05 x 10 = 0.0002``."""
    rate = float(group[ASKED])
    if not lora_layers(module) or "name" not in group or (multiplier := group_multiplier(module, group)) == 1:
        return f"{rate:g}"
    return f"{rate / multiplier:g} x {multiplier:g} = {rate:g}"


def _contents(module: nn.Module, parameters: list[nn.Parameter]) -> str:
    """``35 adapters and 2 parameters trained in full``; empty if none is a trained one of the module."""
    held = {id(parameter) for parameter in parameters}
    layers = [layer for layer in lora_layers(module).values() if held & {id(f) for f in layer.lora_factors().values()}]
    factors = {id(factor) for layer in layers for factor in layer.lora_factors().values()}
    full = sum(p.requires_grad for p in module.parameters() if id(p) in held - factors)
    ends = {end[-1] for layer in layers for end, f in layer.lora_factors().items() if id(f) in held and f.requires_grad}
    parts = [f"{f'{ends.pop()} of ' if len(ends) == 1 else ''}{len(layers)} adapters"] if layers else []
    return " and ".join([*parts, *([f"{full} parameters trained in full"] if full else [])])


def _groups(optimizer: Any) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Parameter groups, each with the parameters of the module that it updates."""
    yield from zip(
        optimizer.param_groups,
        held_groups(optimizer) or [group["params"] for group in optimizer.param_groups],
        strict=False,
    )


def held_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """Parameters of the module in each group of DeepSpeed's ZeRO, which updates flat copies; empty for others."""
    # ZeRO keeps them in one of these lists, stage 3 in the second.
    return next((groups for name in ("bit16_groups", "fp16_groups") if (groups := getattr(optimizer, name, None))), [])


def _schedulers(trainer: Trainer, optimizer: Any) -> list[str]:
    """Class names of the schedulers of ``optimizer``."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [type(scheduler).__name__ for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
