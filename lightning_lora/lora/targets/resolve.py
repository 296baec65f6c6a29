"""From settings to targets: everything that an injection will do, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import nn

from lightning_lora.errors import LayerError, TargetNotFoundError, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.attention import output_projections
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.layers.dora import with_magnitude
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.targets.adaptable import Candidates, check_built, find_candidates
from lightning_lora.lora.targets.new_weights import NewWeights, find_new_weights
from lightning_lora.lora.targets.ranks import adapter_specs, check_rate_patterns, warn_of_unused_patterns
from lightning_lora.lora.targets.selection import is_inside, is_targeted, select, trainable_modules
from lightning_lora.lora.targets.shared_weights import TiedWeights, resolve_tied_weights
from lightning_lora.lora.targets.unused_settings import warn_of_unused

REASON = "of an unknown kind"


@dataclass(frozen=True)
class Target:
    """One layer to adapt.

    Args:
        kind: The class of adapted layer that it becomes.
        specs: Name of each weight in the layer to its rank, alpha and role.
    """

    name: str
    module: nn.Module
    kind: type[LoRALayer]
    specs: dict[str, AdapterSpec]

    @property
    def spec(self) -> AdapterSpec:
        """The spec of the first weight."""
        return next(iter(self.specs.values()))


@dataclass(frozen=True)
class Targets:
    """All that a config selects in a module.

    Args:
        trainable: Name to module for every module to train in full.
        skipped: Name of every other layer with weights to the reason why it is left alone.
        tied: What happens to weights that several layers share.
        unknown: Name of every weight matrix in a module of an unknown kind to the class of the module.
        new: Weights that no checkpoint seems to hold.
        weights: The weights to adapt, by name; those that follow another layer are left out.
    """

    layers: tuple[Target, ...]
    trainable: dict[str, nn.Module]
    skipped: dict[str, str]
    tied: TiedWeights
    unknown: dict[str, str]
    new: NewWeights
    weights: Candidates


def resolve_targets(root: nn.Module, config: LoRAConfig) -> Targets:
    """Find what ``config`` selects in ``root``, without changing anything.

    Raises:
        TargetNotFoundError: If a pattern matches nothing, or nothing is left to adapt.
        ConfigError: If ``root`` is adapted already, a target shares its weight with another module, a layer named in
            ``rank_pattern`` is too small for its rank, or dropout is set for a layer where it cannot act.
    """
    ranks = {s.rank for module in root.modules() if isinstance(module, LoRALayer) for s in module.lora_specs.values()}
    if ranks:
        raise LayerError(
            f"the module is adapted already, at rank {' and '.join(map(str, sorted(ranks)))}; call remove_lora(module) "
            f"before adapting it again."
        )
    check_built(root)
    candidates = find_candidates(root)
    refused = {name: weight.refusal for name, weight in candidates.items() if weight.refusal}
    if len(refused) == len(candidates):
        raise TargetNotFoundError(_nothing_adaptable(root, refused))
    new = find_new_weights(root, config)
    trainable = trainable_modules(root, config) | new.modules
    selected, skipped = select(root, candidates, trainable, config)
    tied = resolve_tied_weights(root, selected, trainable, config)
    layers = _layers(root, selected, config)
    inner = [(top, name) for top, part in trainable.items() for name, _ in part.named_modules()]
    trained = [join(top, name) if name else top for top, name in inner]
    adapters = [name for weight in selected.values() for name in (weight.name, weight.layer)]
    check_rate_patterns(config, [*adapters, *trained])
    warn_of_unused_patterns("lr_multiplier_pattern", config.lr_multiplier_pattern, [*adapters, *trained])
    if config.dora:
        layers = _with_magnitudes(root, layers, tied)
    _check_dropout(root, layers, config)
    _warn_of_refused_targets(candidates, trainable, config)
    warn_of_unused(root, candidates, skipped, {each.name: each.kind for each in layers}, tied, config)
    _warn_of_half_adapted_experts(root, candidates, selected, config)
    adapted = {*selected, *tied.followers}
    unknown = unknown_weights(root, candidates, trainable)
    reasons = skipped | refused | dict.fromkeys(unknown, REASON)
    left_alone = {name: reason for name, reason in reasons.items() if name not in adapted}
    return Targets(layers, trainable, left_alone, tied, unknown, new, selected)


def _nothing_adaptable(root: nn.Module, refused: dict[str, str]) -> str:
    kinds = ", ".join(sorted({type(module).__name__ for module in root.modules()})[:8])
    reasons = "".join(f" {name}: {reason}." for name, reason in list(refused.items())[:3])
    return f"{type(root).__name__} has no layer that can be adapted; it holds {kinds}.{reasons}"


def _layers(root: nn.Module, selected: Candidates, config: LoRAConfig) -> tuple[Target, ...]:
    layers: dict[str, Target] = {}
    for name, spec in adapter_specs(root, selected, config).items():
        weight = selected[name]
        target = Target(weight.layer, root.get_submodule(weight.layer), weight.kind(root), {})
        layers.setdefault(weight.layer, target).specs[weight.parameter] = spec
    return tuple(layers.values())


def _with_magnitudes(root: nn.Module, layers: Iterable[Target], tied: TiedWeights) -> tuple[Target, ...]:
    """The same layers as kinds with a magnitude.

    Raises:
        ConfigError: If a layer has no such kind, or shares its update with another layer.
    """
    read = output_projections(root)
    kinds = [(target, None if target.name in read else with_magnitude(target.kind)) for target in layers]
    lacking = [f"{target.name} ({type(target.module).__name__})" for target, kind in kinds if kind is None]
    if lacking:
        raise LayerError(
            f"dora=True is for linear layers, convolutions and embeddings, and {len(lacking)} of the targeted layers "
            f"have no magnitude: {first_five(lacking)}. Name them in exclude, or set dora to False."
        )
    if tied.followers:
        name, source = next(iter(tied.followers.items()))
        raise LayerError(
            f"dora=True cannot give {name} the update of {source}, with which it shares its weight: set tied_weights "
            f"to 'untie', or dora to False."
        )
    return tuple(replace(target, kind=kind) for target, kind in kinds if kind is not None)


def without_dropout(root: nn.Module, layers: Iterable[Target]) -> list[str]:
    """Names of the layers whose update has no input of its own that dropout could act on."""
    read = output_projections(root)
    return [target.name for target in layers if target.name in read or not target.kind.takes_dropout(target.module)]


def _check_dropout(root: nn.Module, layers: Iterable[Target], config: LoRAConfig) -> None:
    names = without_dropout(root, layers) if config.dropout else []
    if names:
        raise LayerError(
            f"dropout={config.dropout:g} cannot act on {len(names)} of the targeted layers ({first_five(names)}): "
            f"attention, recurrent layers and convolutions with a forward of their own compute with the sum of weight "
            f"and update. Set dropout to 0, or exclude them."
        )


def _warn_of_refused_targets(candidates: Candidates, trainable: Collection[str], config: LoRAConfig) -> None:
    passed_over = [
        f"{name} ({weight.refusal})"
        for name, weight in candidates.items()
        if weight.refusal
        and is_targeted(weight, config)
        and not matches_any(name, config.exclude)
        and not is_inside(name, trainable)
    ]
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} targeted layers cannot be adapted and stay frozen: {first_five(passed_over)}. Name "
            f"them in exclude if that is meant.",
            stacklevel=4,
        )


def _warn_of_half_adapted_experts(
    root: nn.Module, candidates: Candidates, selected: Candidates, config: LoRAConfig
) -> None:
    """Warn of experts of which one weight is adapted and the other is not, unless it is named in ``exclude``.

    The usual names of a dense MLP do this: ``down_proj`` is also a weight of fused experts, and the other one there is
    ``gate_up_proj``.
    """
    layers = {weight.layer for weight in selected.values() if issubclass(weight.kind(root), LoRAFusedExperts)}
    missing = {
        name: weight
        for name, weight in candidates.items()
        if weight.layer in layers and name not in selected and not weight.matches_any(config.exclude)
    }
    if missing:
        names = sorted({".".join(name.split(".")[-2:]) for name in missing})
        half = sorted(name for name, weight in selected.items() if weight.layer in {m.layer for m in missing.values()})
        warnings.warn(
            f"{len(missing)} layers of experts are adapted in only one of their two weights: {first_five(half)}. Add "
            f"{', '.join(map(repr, names))} to targets to adapt both, or to exclude if that is meant.",
            stacklevel=4,
        )


def unknown_weights(root: nn.Module, candidates: Candidates, trainable: Collection[str]) -> dict[str, str]:
    """Dotted name of every parameter with two axes or more that no target can select, to the class of its module."""
    layers = {weight.layer for weight in candidates.values()}
    # The refusal of a layer stands for all that is in it.
    spoken_for = {weight.layer for weight in candidates.values() if weight.refusal} | {*trainable}
    found = {}
    for layer, module in root.named_modules():
        if is_inside(layer, spoken_for):
            continue
        kind = adapter_kind(module) if layer in layers else None
        adaptable = kind.weights(module) if kind is not None else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and name not in adaptable:
                found[plain_name(join(layer, name))] = type(module).__name__
    return found


def note_on_unknown(unknown: dict[str, str]) -> str:
    """The line for the start of a run."""
    named = first_five([f"{name} ({kind})" for name, kind in unknown.items()])
    return (
        f"no adapter for {named}: trainable trains a module in full, register_layer gives its class an adapter, and "
        f"requires_grad_(True) after the injection trains a single parameter"
    )
