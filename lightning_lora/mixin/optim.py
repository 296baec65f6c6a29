"""Parameter groups by the learning-rate rule, and the check that an optimizer trains the adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import GuardError, OptimizerSettingError, first_five
from lightning_lora.lora.layers.adapted import factor_parameters, held_factors, lora_layers
from lightning_lora.lora.shards import reshard
from lightning_lora.mixin.multipliers import adapter_groups, full_groups, group_multiplier
from lightning_lora.mixin.rates import ASKED, held_groups

# Far below the gradients of a factor, which shrink with alpha / rank.
ADAPTER_EPS = 1e-12


def parameter_groups(module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Make optimizer groups for ``module``, adapted or not; no group is empty.

    Adapters get the learning rate ``learning_rate * lr_multiplier``, no weight decay and eps 1e-12. All other trainable
    parameters (fully trained modules, or the whole model without LoRA) get ``learning_rate``. Layers that
    ``lr_multiplier_pattern`` names get its factor instead, and with LoRA+ the factors that start at zero
    ``lora_plus_ratio`` times the rate of the others; these have groups of their own.

    Args:
        module: The module to train.
        learning_rate: The learning rate *for full fine-tuning*, greater than 0.

    Raises:
        ConfigError: If the learning rate is not a positive number, or nothing is trainable.

    References:
        *LoRA Without Regret*, 2025: the best learning rate for LoRA is about ten times the best for full fine-tuning.
    """
    check_learning_rate(learning_rate)
    held = {id(factor) for factor in held_factors(module).values()}
    factors = [factor for factor in factor_parameters(module).values() if id(factor) not in held]
    adapters = {id(factor) for factor in factors}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in adapters]
    groups = [group | {"weight_decay": 0.0, "eps": ADAPTER_EPS} for group in adapter_groups(module, factors)]
    groups += full_groups(module, others)
    if not groups:
        raise OptimizerSettingError(f"{type(module).__name__} has no trainable parameter: everything is frozen.")
    rates = [learning_rate * group_multiplier(module, group) for group in groups]
    return [group | {"lr": rate, ASKED: rate} for group, rate in zip(groups, rates, strict=True)]


def check_learning_rate(learning_rate: Any) -> None:
    """Raise `ConfigError` unless the rate is a finite number greater than 0."""
    number = isinstance(learning_rate, (int, float)) and not isinstance(learning_rate, bool)
    if not number or not math.isfinite(learning_rate) or learning_rate <= 0:
        raise OptimizerSettingError(f"learning_rate must be a finite number greater than 0, got {learning_rate!r}.")


def check_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise `GuardError` unless every adapter is trainable and in at least one optimizer."""
    reshard(module)
    held = {id(parameter) for optimizer in optimizers for parameter in _held(optimizer)}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise GuardError(f"nothing would train: every parameter of {type(module).__name__} is frozen.")
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if missing:
        raise GuardError(
            f"{len(missing)} of {len(trainable)} trainable parameters are in no optimizer and would not train "
            f"({first_five(missing)}). The optimizer was built before the adapters existed, or from other parameters: "
            f"build it in configure_optimizers from self.lora_parameter_groups(lr) or self.parameters()."
        )
    _check_decay(module, optimizers)
    held = held_factors(module)
    frozen = [n for n, factor in factor_parameters(module).items() if not factor.requires_grad and n not in held]
    if frozen:
        raise GuardError(f"{len(frozen)} adapter parameters are frozen and would not train: {first_five(frozen)}.")


def _check_decay(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse weight decay of factors that hold their start, which must stay as it is."""
    starting = {
        id(factor): spec.config.init
        for layer in lora_layers(module).values()
        for weight, spec in layer.lora_specs.items()
        for factor in layer.lora_pair(weight)
        if spec.start
    }
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("weight_decay")]
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if id(parameter) in starting:
            raise GuardError(
                f"weight decay would change the part of the adapters that keeps their start "
                f"(init={starting[id(parameter)]!r}): set weight_decay=0 for adapters, as "
                f"self.lora_parameter_groups(lr) does."
            )


def _held(optimizer: Any) -> list[nn.Parameter]:
    """Parameters of the module that ``optimizer`` updates."""
    groups = held_groups(optimizer) or [group["params"] for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group]
