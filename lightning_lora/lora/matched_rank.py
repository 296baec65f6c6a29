"""Comparisons at equal size: the rank at which other targets have as many adapter parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.targets.resolve import resolve_targets


def matched_rank(module: nn.Module, targets: str | Sequence[str], like: LoRAConfig) -> int:
    """The rank at which ``targets`` get as many adapter parameters as ``like`` gives ``module``, as near as can be.

    Nothing is changed; a module on the meta device will do. Layers too small for the rank count at their full rank, as
    `inject_lora` would adapt them. Of two ranks equally near the smaller is returned.

    Args:
        module: The unadapted module.
        targets: What else to adapt: as `LoRAConfig.targets`.
        like: The settings to match. All of them but ``targets``, ``rank`` and ``rank_pattern`` hold for the result too.

    Raises:
        TargetNotFoundError: If either selects nothing.
        ConfigError: If ``targets`` cannot hold that many parameters at any rank.

    Example:
        An attention-only baseline for adapters on all layers::

            like = LoRAConfig(rank=32)
            baseline = LoRAConfig(rank=matched_rank(model, "attention", like), targets="attention")
    """
    other = replace(like, targets=targets if isinstance(targets, str) else tuple(targets), rank_pattern={})
    goal = _num_parameters(module, like)
    high, count = 1, 0
    while (reached := _num_parameters(module, replace(other, rank=high))) < goal:
        if reached == count and high > like.rank:
            raise ConfigError(
                f"targets={targets!r} hold {reached:,} adapter parameters at most, fewer than the {goal:,} of rank "
                f"{like.rank} on {like.targets!r}: match at a lower rank."
            )
        high, count = 2 * high, reached
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _num_parameters(module, replace(other, rank=middle)) < goal else (low, middle)
    ranks = [rank for rank in (low, high) if rank]
    return min(ranks, key=lambda rank: abs(_num_parameters(module, replace(other, rank=rank)) - goal))


def _num_parameters(module: nn.Module, config: LoRAConfig) -> int:
    with warnings.catch_warnings():
        # Layers at their full rank are nothing to warn of before anything is adapted.
        warnings.filterwarnings("ignore", message="rank .* is more than")
        layers = resolve_targets(module, config).layers
    return sum(
        math.prod(shape)
        for layer in layers
        for name, spec in layer.specs.items()
        for shape in layer.kind.factor_shapes(layer.module, name, spec)
    )
