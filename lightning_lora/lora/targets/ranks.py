"""How each chosen weight is adapted: its rank, its alpha, and what is refused about them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError, TargetNotFoundError, closest, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.base import AdapterSpec
from lightning_lora.lora.targets.adaptable import AdaptableWeight, Weights


def adapter_specs(root: nn.Module, selected: Weights, config: LoRAConfig) -> dict[str, AdapterSpec]:
    """Name of every selected weight to how it is adapted.

    Raises:
        TargetNotFoundError: If a pattern of ranks or alphas matches none of them.
        ConfigError: If a weight is too small for the rank it was given by name.
    """
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(weight.is_hit(name, pattern) for name, weight in selected.items()):
                hint = closest(pattern, dict.fromkeys(name.rpartition(".")[2] for name in selected), count=5)
                raise TargetNotFoundError(
                    f"{option} {pattern!r} matches none of the {len(selected)} adapted layers{hint}"
                )
    specs, capped = {}, []
    for name, weight in selected.items():
        num_in, num_out, _ = weight.kind(root).weights(root.get_submodule(weight.layer))[weight.parameter]
        given, usual = weight.first_hit(name, config.rank_pattern, 0), _usual_rank(root, weight, config)
        if given > min(num_in, num_out):
            raise ConfigError(
                f"rank must be in [1, {min(num_in, num_out)}] for {name!r}, a ({num_out}, {num_in}) weight, "
                f"got rank={given} from rank_pattern."
            )
        if not given and usual > min(num_in, num_out):
            capped.append(f"{name} ({min(num_in, num_out)})")
        alpha = weight.first_hit(name, config.alpha_pattern, config.alpha)
        specs[name] = AdapterSpec(given or min(usual, num_in, num_out), alpha, weight.role, config)
    if capped:
        warnings.warn(
            f"rank {config.rank} is more than {len(capped)} of {len(selected)} adapted layers can hold; they get their "
            f"full rank instead: {first_five(capped)}. Lower the rank, or exclude them.",
            stacklevel=5,
        )
    return specs


def _usual_rank(root: nn.Module, weight: AdaptableWeight, config: LoRAConfig) -> int:
    """The rank a weight gets without a pattern: experts share it among those that are active for a token."""
    if weight.role != "experts" or config.share_expert_factors:
        return config.rank
    return max(1, config.rank // active_experts(root, weight.layer))


# Attributes of a mixture, its router or its config; transformers and others have found no single name.
_NAMES = (
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


def active_experts(root: nn.Module, name: str) -> int:
    """Experts per token of the mixture that the expert layer ``name`` is in, read from the modules around it.

    1, with a warning, where nothing says: every expert then gets the whole rank.

    References:
        *LoRA Without Regret*, 2025: rank / active experts keeps the ratio of adapter to base parameters that dense
        layers have.
    """
    path = name
    while True:
        module = root.get_submodule(path)
        for holder in (module, *(getattr(module, part, None) for part in ("config", "gate", "router"))):
            number = _number(holder)
            if number:
                return number
        if not path:
            break
        path = path.rpartition(".")[0]
    warnings.warn(
        f"nothing in {type(root).__name__} says how many experts are active for a token (looked for "
        f"{', '.join(_NAMES)}): each expert gets the whole rank. Set rank_pattern for the experts.",
        stacklevel=2,
    )
    return 1


def _number(holder: Any) -> int:
    values = (getattr(holder, name, None) for name in _NAMES)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
