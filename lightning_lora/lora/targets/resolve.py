"""What a config selects in a module, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import ConfigError, TargetNotFoundError, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.attention import output_projections
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.patterns import matches_any
from lightning_lora.lora.targets.adaptable import Weights, adaptable_weights, check_built, refused_layers
from lightning_lora.lora.targets.ranks import adapter_specs
from lightning_lora.lora.targets.selection import is_inside, is_targeted, select, trainable_modules, wanted_weights
from lightning_lora.lora.targets.shared_weights import Tied, resolve_tied


@dataclass(frozen=True)
class Target:
    """One layer to adapt: the module, the kind of adapted layer it becomes, and how each of its weights is adapted."""

    name: str
    module: nn.Module
    kind: type[LoRALayer]
    specs: dict[str, AdapterSpec]

    @property
    def spec(self) -> AdapterSpec:
        """How the first of its weights is adapted."""
        return next(iter(self.specs.values()))


@dataclass(frozen=True)
class Targets:
    """What a config selects in a module: layers to adapt, modules to train in full, and what was left out and why."""

    layers: tuple[Target, ...]
    trainable: dict[str, nn.Module]
    skipped: dict[str, str]
    tied: Tied


def resolve_targets(root: nn.Module, config: LoRAConfig) -> Targets:
    """Find the layers ``config`` means in ``root`` without changing anything.

    Raises:
        TargetNotFoundError: If a pattern matches nothing, or nothing is left to adapt.
        ConfigError: If ``root`` is adapted already, a target shares its weight with another module, a layer named in
            ``rank_pattern`` is too small for its rank, or dropout is asked for where it cannot act.
    """
    if any(isinstance(module, LoRALayer) for module in root.modules()):
        raise ConfigError("the module is adapted already; call remove_lora(module) before adapting it again.")
    check_built(root)
    refused = refused_layers(root)
    every = adaptable_weights(root, refused)
    weights = {name: weight for name, weight in every.items() if weight.parameter}
    if not weights:
        found = ", ".join(sorted({type(module).__name__ for module in root.modules()})[:8])
        reasons = "".join(f" {name}: {reason}." for name, reason in list(refused.items())[:3])
        raise TargetNotFoundError(f"{type(root).__name__} has no layer that can be adapted; it holds {found}.{reasons}")
    trainable = trainable_modules(root, config)
    wanted = wanted_weights(root, every, refused, config)
    selected, skipped = select(root, weights, refused, wanted, config, trainable)
    tied = resolve_tied(root, selected, config)
    layers = _layers(root, selected, config)
    _check_dropout(root, layers, config)
    passed_over = [
        f"{name} ({reason})"
        for name, reason in refused.items()
        if is_targeted(name, every[name], config)
        and not matches_any(name, config.exclude)
        and not is_inside(name, trainable)
    ]
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} targeted layers cannot be adapted and stay frozen: {first_five(passed_over)}. Name "
            f"them in exclude if that is meant.",
            stacklevel=3,
        )
    adapted = {*selected, *tied.followers}
    left_alone = {name: reason for name, reason in (skipped | refused).items() if name not in adapted}
    return Targets(layers, trainable, left_alone, tied)


def _layers(root: nn.Module, selected: Weights, config: LoRAConfig) -> tuple[Target, ...]:
    layers: dict[str, Target] = {}
    for name, spec in adapter_specs(root, selected, config).items():
        weight = selected[name]
        target = Target(weight.layer, root.get_submodule(weight.layer), weight.kind(root), {})
        layers.setdefault(weight.layer, target).specs[weight.parameter] = spec
    return tuple(layers.values())


def without_dropout(root: nn.Module, layers: Iterable[Target]) -> list[str]:
    """Names of the layers whose update has no input of its own for dropout to act on."""
    read = output_projections(root)
    return [target.name for target in layers if target.name in read or not target.kind.takes_dropout(target.module)]


def _check_dropout(root: nn.Module, layers: Iterable[Target], config: LoRAConfig) -> None:
    names = without_dropout(root, layers) if config.dropout else []
    if names:
        raise ConfigError(
            f"dropout={config.dropout:g} cannot act on {len(names)} of the targeted layers ({first_five(names)}): "
            f"attention, recurrent layers and convolutions with a forward of their own compute with the sum of weight "
            f"and update. Set dropout to 0, or exclude them."
        )
