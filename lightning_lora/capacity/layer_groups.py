"""Adapted weights by layer and role, such as ``layer 11 mlp``, and the spectra of their updates."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from lightning_lora.capacity.half_rank import singular_values
from lightning_lora.lora.layers.adapted import adapted_weights

MAX_GROUPS = 64
"""Groups above this number are joined by role: each costs two passes over the held-out rows."""


def layer_groups(module: nn.Module) -> dict[str, list[str]]:
    """Names of groups to the names of their adapted weights: by the number in the name, and the role.

    Without a number, or a known role, a weight is a group of its own. More than 64 groups are joined by role.
    """
    weights = adapted_weights(module)
    by_layer: dict[str, list[str]] = {}
    by_role: dict[str, list[str]] = {}
    for name, (layer, weight) in weights.items():
        role = layer.lora_specs[weight].role
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        by_layer.setdefault(f"layer {number[1]} {role}" if number and role != "other" else name, []).append(name)
        by_role.setdefault(role, []).append(name)
    return by_layer if len(by_layer) <= MAX_GROUPS else by_role


def spectra(module: nn.Module, groups: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
    """Mean stable rank, effective rank and rank of the updates of each group; zero for an update that is zero.

    The stable rank is ``sum s^2 / max s^2``, the effective rank ``exp(entropy(s / sum s))``. They describe an update;
    they do not tell full adapters from others.

    References:
        Roy and Vetterli, *The Effective Rank*, EUSIPCO 2007
    """
    weights = adapted_weights(module)
    found: dict[str, dict[str, float]] = {}
    for group, names in groups.items():
        values = [
            singular_values(*layer.lora_pair(weight)).double() for layer, weight in map(weights.__getitem__, names)
        ]
        # Experts are matrices of their own.
        matrices = [row for value in values for row in value.reshape(-1, value.shape[-1])]
        found[group] = {
            "rank": sum(len(row) for row in matrices) / len(matrices),
            "stable_rank": sum(_stable_rank(row) for row in matrices) / len(matrices),
            "effective_rank": sum(_effective_rank(row) for row in matrices) / len(matrices),
        }
    return found


def mean_spectrum(module: nn.Module, names: list[str]) -> list[float]:
    """Singular values of the updates of a group, scaled, descending: the mean over its weights of each place."""
    weights = adapted_weights(module)
    rows = []
    for layer, weight in map(weights.__getitem__, names):
        values = singular_values(*layer.lora_pair(weight)).double() * layer.lora_specs[weight].scale
        rows += list(values.reshape(-1, values.shape[-1]))
    length = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in rows]).mean(0).tolist()


def _stable_rank(values: torch.Tensor) -> float:
    return float(values.square().sum() / values.max().square()) if values.max() > 0 else 0.0


def _effective_rank(values: torch.Tensor) -> float:
    if not values.max() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
