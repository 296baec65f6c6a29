"""Comparisons at equal size: the rank at which other targets have as many adapter parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lightning_lora.errors import LayerError, check_arguments
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.targets.resolve import resolve_targets


def matched_rank(module: nn.Module, targets: str | Sequence[str], like: LoRAConfig) -> int:
    """The rank at which ``targets`` have as nearly as possible the number of adapter parameters that ``like`` has.

    ``module`` is not changed, and may be on the meta device. Layers too small for the rank count at their full rank,
    as `inject_lora` would adapt them. Of two ranks equally near, the smaller one is returned.

    Args:
        module: The module without adapters.
        targets: The other targets: a role or name patterns, as in `LoRAConfig.targets`.
        like: The settings to match. All of them except ``targets``, ``rank`` and ``rank_pattern`` also apply to the
            result.

    Raises:
        TargetNotFoundError: If either selects nothing.
        ConfigError: If ``targets`` cannot hold that many parameters at any rank.

    Example:
        An attention-only baseline for adapters on all layers::

            like = LoRAConfig(rank=32)
            baseline = LoRAConfig(rank=matched_rank(model, "attention", like), targets="attention")
    """
    check_arguments(matched_rank, locals())
    own = targets if isinstance(targets, str) else tuple(targets)
    other = replace(like, targets=own, rank_pattern={}, lr_multiplier_pattern={})
    goal = _num_parameters(module, like)
    high, count = 1, 0
    while (reached := _num_parameters(module, replace(other, rank=high))) < goal:
        if reached == count and high > like.rank:
            raise LayerError(
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
    """Adapter parameters that ``config`` gives ``module``."""
    with warnings.catch_warnings():
        # Ranks beyond a layer's full rank are only tried here.
        warnings.filterwarnings("ignore", message="rank .* is more than")
        layers = resolve_targets(module, config).layers
    return sum(
        math.prod(shape)
        for layer in layers
        for name, spec in layer.specs.items()
        for shape in layer.kind.factor_shapes(layer.module, name, spec)
    )
