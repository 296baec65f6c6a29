"""The learning rate of a plan, and what of the model trains at which multiple of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.mixin.multipliers import group_multiplier
from lightning_lora.mixin.rates import ASKED
from lightning_lora.planning.advice.config_file import taken_arguments
from lightning_lora.planning.advice.method import Method
from lightning_lora.planning.advice.settings import TML, choose_rate
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.reason import Reason
from lightning_lora.tasks.pretrained import PretrainedTask

_NAMES = ("learning_rate", "lr")
_SHOWN_PATTERNS = 3


@dataclass(frozen=True)
class PlannedRate:
    """The learning rate of a plan.

    Args:
        value: The rate in terms of full fine-tuning; None if the module sets rates that no such number gives.
        multiplier: What most adapters multiply it by.
        reason: Why, and what it applies to.
    """

    value: float | None
    multiplier: float
    reason: Reason


def planned_rate(
    module: LightningModule,
    traces: TracedMethods,
    method: Method,
    lora: LoRAConfig,
    trained: int,
    config: Mapping[str, Any] | None,
) -> PlannedRate:
    """The rate that a config names or an object has, else that of a law or the default of the class.

    A task of this package gives its adapters multiples of one rate. What any other module does is read from the
    parameter groups of its optimizers.

    Args:
        config: The settings of ``fit`` that the module came from.
    """
    rate = _own_rate(module)
    if isinstance(module, PretrainedTask):
        known = taken_arguments(type(module))
        is_named = "learning_rate" in (((config or {}).get("model") or {}).get("init_args") or {})
        given = None if rate == known.get("learning_rate") and not is_named else rate
        applies = "" if method.rank is None else applied_rates(lora, trained)
        return _chosen(given, rate, module, lora, applies)
    groups = [] if method.name in traces.failed else _groups(traces, method)
    if groups and all(ASKED in group for group in groups):
        built = traces.tracer(method.name, method.rank).module
        base = float(groups[0][ASKED]) / group_multiplier(built, groups[0])
        applies = "" if method.rank is None else applied_rates(lora, trained)
        return _chosen(float(f"{base:.6g}"), None, module, lora, applies)
    if not groups:
        chosen = _chosen(rate, None, module, lora, "the module decides what trains at which rate")
        return replace(chosen, multiplier=1.0)
    return _by_its_optimizers(traces, method, groups, rate)


def _chosen(
    given: float | None, default: float | None, module: LightningModule, lora: LoRAConfig, applies: str
) -> PlannedRate:
    value, reason = choose_rate(given, default, getattr(module, "model_config", None), applies)
    return PlannedRate(value, lora.lr_multiplier if applies else 1.0, reason)


def applied_rates(lora: LoRAConfig, trained: int) -> str:
    """What trains at which multiple of the rate of full fine-tuning, in words."""
    plus = lora.lora_plus_ratio

    def times(multiplier: float) -> str:
        return f"{multiplier:g}" if plus == 1 else f"{multiplier:g} (B: {multiplier * plus:g}, LoRA+)"

    told = [f"adapters train at {times(lora.lr_multiplier)} times this rate"]
    patterns = [f"{pattern} at {times(value)}" for pattern, value in lora.lr_multiplier_pattern.items()]
    if patterns:
        more = len(patterns) - _SHOWN_PATTERNS
        others = f" and {more} more" if more > 0 else ""
        told.append(f"{', '.join(patterns[:_SHOWN_PATTERNS])}{others} (lr_multiplier_pattern)")
    if trained:
        told.append("what is trained in full at the rate itself")
    return ", ".join(told)


def _own_rate(module: LightningModule) -> float | None:
    """The rate that a module has as an attribute or a hyperparameter."""
    for name in _NAMES:
        for value in (getattr(module, name, None), module.hparams.get(name)):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
    return None


def _groups(traces: TracedMethods, method: Method) -> list[dict[str, Any]]:
    """The parameter groups of the optimizers that the module makes for a method."""
    made = traces.tracer(method.name, method.rank).module.configure_optimizers()
    return [group for each in tree_leaves(made) if isinstance(each, Optimizer) for group in each.param_groups]


def _by_its_optimizers(
    traces: TracedMethods, method: Method, groups: Iterable[Mapping[str, Any]], own: float | None
) -> PlannedRate:
    """The rates of a module that does not go by the rule."""
    factors = {id(factor) for factor in factor_parameters(traces.tracer(method.name, method.rank).module).values()}
    adapters, others = set(), set()
    for group in groups:
        rate = float(group.get(ASKED, group.get("initial_lr", group["lr"])))
        for parameter in group["params"]:
            (adapters if id(parameter) in factors else others).add(rate)
    told = [f"{what} {_listed(rates)}" for what, rates in (("adapters", adapters), ("all else", others)) if rates]
    value = own if own is not None and own in adapters | others else None
    multiplier = min(adapters) / value if adapters and value else 1.0
    why = f"the module's own optimizer; it gives {' and '.join(told)}"
    if adapters and min(adapters) == value:
        why += "; a rate meant for full fine-tuning is about ten times too low for adapters"
    return PlannedRate(value, multiplier, Reason("learning rate", why, TML))


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates))
