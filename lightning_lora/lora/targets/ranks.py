"""The rank and alpha of each selected weight."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.errors import LayerError, TargetNotFoundError, did_you_mean, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.growth import grown_spec
from lightning_lora.lora.layers.attention import output_projections
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.first_values import KEPT_STARTS
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.patterns import matches, names_around
from lightning_lora.lora.targets.adaptable import Candidate, Candidates


def adapter_specs(root: nn.Module, selected: Candidates, config: LoRAConfig) -> dict[str, AdapterSpec]:
    """Name to rank, alpha and role for every selected weight.

    Raises:
        TargetNotFoundError: If a pattern of ``rank_pattern`` or ``alpha_pattern`` matches none of the weights.
        ConfigError: If a weight is too small for its rank from ``rank_pattern``.
    """
    names = dict.fromkeys(name for weight in selected.values() for name in (weight.name, weight.layer))
    whom = f"none of the {len(selected)} adapted layers"
    for option in ("rank_pattern", "alpha_pattern"):
        _check_patterns(option, getattr(config, option), names, whom)
    _check_gradient_start(root, selected, config)
    specs, capped = {}, []
    for name, weight in selected.items():
        shape = weight.shape(root)
        full_rank = min(shape.num_in, shape.num_out)
        rank = weight.first_match(config.rank_pattern, 0)
        if rank > full_rank:
            raise LayerError(
                f"rank must be in [1, {full_rank}] for {name!r}, a ({shape.num_out}, {shape.num_in}) weight, got "
                f"rank={rank} from rank_pattern."
            )
        if not rank:
            rank = _default_rank(root, weight, config)
            if rank > full_rank:
                capped.append(f"{name} ({full_rank})")
                rank = full_rank
        alpha = weight.first_match(config.alpha_pattern, config.alpha)
        specs[name] = _with_start(name, AdapterSpec(rank, alpha, weight.role, config), weight.kind(root))
    if capped:
        warnings.warn(
            f"rank {config.rank} is more than {len(capped)} of {len(selected)} adapted layers can hold; they get their "
            f"full rank instead: {first_five(capped)}. Lower the rank, or exclude them.",
            stacklevel=5,
        )
    return specs


def check_rate_patterns(config: LoRAConfig, names: Collection[str]) -> None:
    """Raise `TargetNotFoundError` if a pattern of ``lr_multiplier_pattern`` matches none of the trained ``names``."""
    whom = "neither an adapted layer nor a module trained in full"
    _check_patterns("lr_multiplier_pattern", config.lr_multiplier_pattern, names, whom)


def _check_patterns(option: str, patterns: Iterable[str], names: Collection[str], whom: str) -> None:
    """Raise `TargetNotFoundError` if a pattern of ``option`` matches none of ``names``, in words ``whom``.

    A warning names a pattern that is never used, because those before it match all of its layers.
    """
    left = list(names)
    for pattern in patterns:
        matched = list(dict.fromkeys(name for name in names if matches(name, pattern)))
        if matched and not any(name in left for name in matched):
            warnings.warn(
                f"{option} {pattern!r} has no effect: the first match wins, and patterns before it match all of its "
                f"layers ({first_five(matched)}). Write it before them, or leave it out.",
                stacklevel=6,
            )
        left = [name for name in left if name not in matched]
        if not matched:
            hint = did_you_mean(pattern, dict.fromkeys(name.rpartition(".")[2] for name in names), count=5)
            raise TargetNotFoundError(f"{option} {pattern!r} matches {whom}{hint}")


def _check_gradient_start(root: nn.Module, selected: Candidates, config: LoRAConfig) -> None:
    """Refuse weights whose gradient is not that of a linear layer, if adapters are to start along it."""
    if config.init != "gradient":
        return
    kinds = (LoRALinear, LoRAConv1D, LoRAEmbedding)  # embeddings start by default
    read = output_projections(root)  # by their attention, which does not call them
    others = [
        f"{name} ({type(root.get_submodule(weight.layer)).__name__})"
        for name, weight in selected.items()
        if name in read or not issubclass(weight.kind(root), kinds)
    ]
    if others:
        raise LayerError(
            f"init='gradient' measures gradients of linear layers, and {len(others)} of {len(selected)} targeted "
            f"layers are none, or are read by another layer: {first_five(others)}. Name them in exclude, or use "
            f"another init."
        )


def _with_start(name: str, spec: AdapterSpec, kind: type[LoRALayer]) -> AdapterSpec:
    """``spec`` with room for a start that is kept, and the same scale, if the settings ask for one.

    Raises:
        ConfigError: If the weight cannot start as the settings ask.
    """
    init, rank = spec.config.init, spec.rank
    if issubclass(kind, LoRAEmbedding):
        return spec
    if init == "orthogonal" and rank % 2:
        raise LayerError(f"init='orthogonal' needs an even rank, got rank={rank} for {name!r}: see rank_pattern.")
    if init not in KEPT_STARTS:
        return spec
    if spec.config.share_expert_factors and issubclass(kind, LoRAFusedExperts):
        raise LayerError(
            f"init='pissa' takes the factors of each expert from its own weight, and share_expert_factors shares them "
            f"in {name!r}: set share_expert_factors to false, or use another init."
        )
    return replace(grown_spec(spec, 2 * rank), start=rank)


def _default_rank(root: nn.Module, weight: Candidate, config: LoRAConfig) -> int:
    """The rank of a weight without a pattern of its own: the active experts of a mixture share it."""
    return max(1, config.rank // rank_divisor(root, weight, config))


def rank_divisor(root: nn.Module, weight: Candidate, config: LoRAConfig) -> int:
    """What the rank of a weight without a pattern of its own is divided by: 1, or the active experts of a mixture."""
    return 1 if weight.role != "experts" or config.share_expert_factors else active_experts(root, weight.layer)


# Names that libraries give the number of active experts, in a mixture, its router or its config.
_ACTIVE_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "topk",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "k",
)


def active_experts(root: nn.Module, layer: str) -> int:
    """The number of experts per token in the mixture around an expert layer, read from the modules around it.

    If nothing tells the number, it is 1, with a warning: every expert then gets the full rank.

    References:
        *LoRA Without Regret*, 2025: rank / active experts keeps the ratio of adapter to base parameters that dense
        layers have.
    """
    for path in (*names_around(layer), ""):
        module = root.get_submodule(path)
        for holder in (module, *(getattr(module, name, None) for name in ("config", "gate", "router"))):
            if number := _number_of_active_experts(holder):
                return number
    warnings.warn(
        f"nothing in {type(root).__name__} says how many experts are active for a token (looked for "
        f"{', '.join(_ACTIVE_EXPERTS)}): each expert gets the full rank. Set rank_pattern for the experts.",
        stacklevel=2,
    )
    return 1


def _number_of_active_experts(holder: Any) -> int:
    """The number that ``holder`` has under one of the known names; 0 if it has none."""
    values = (getattr(holder, name, None) for name in _ACTIVE_EXPERTS)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
