"""Which groups of adapted layers use their rank, and by how much each may grow within a budget of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_lora.lora.functional.spectrum import singular_values
from lightning_lora.lora.layers.adapted import adapted_weights
from lightning_lora.lora.layers.base import LoRALayer


@dataclass(frozen=True)
class GroupGrowth:
    """A group of layers that is to grow.

    Args:
        before: Name of each adapted weight of the group that grows, to its present rank.
        after: Name of each of these weights to its new rank.
        beyond_half: Share of the updates that half of the present rank cannot hold (`beyond_half_rank`).
        parameters: Parameters that the growth adds.
    """

    group: str
    before: dict[str, int]
    after: dict[str, int]
    beyond_half: float
    parameters: int


def groups_by_parent(module: nn.Module) -> dict[str, list[str]]:
    """Name of a group to its adapted weights: the layers in one parent, such as those of one attention or MLP.

    If all adapted layers have the same parent, each weight is a group.

    >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    >>> from lightning_lora import LoRAConfig, inject_lora
    >>> _ = inject_lora(blocks, LoRAConfig(rank=1, targets=["0", "1"]))
    >>> groups_by_parent(blocks)
    {'0': ['0.0', '0.1'], '1': ['1.0', '1.1']}
    """
    groups: dict[str, list[str]] = {}
    for name in adapted_weights(module):
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups if len(groups) > 1 else {name: [name] for name in adapted_weights(module)}


@torch.no_grad()
def beyond_half_rank(module: nn.Module, names: list[str]) -> float:
    """Share of the squared Frobenius norm of the updates ``s B A`` that the best updates of half the rank lack.

    By Eckart and Young it is the sum of the squared singular values after the first ``rank // 2``, over all of them;
    0 without an update, 1 at rank 1. It says how much of the rank is *used*. It cannot say that more rank would help:
    noise uses rank as well.
    """
    weights, lacking, total = adapted_weights(module), 0.0, 0.0
    for name in names:
        layer, weight = weights[name]
        spec = layer.lora_specs[weight]
        squares = singular_values(*layer.lora_pair(weight), spec.scale).square()
        lacking += float(squares[..., spec.rank // 2 :].sum())
        total += float(squares.sum())
    return lacking / total if total > 0 else 0.0


def parameters_per_rank(layer: LoRALayer, weight: str) -> int:
    """Parameters that one more rank adds to an adapted weight."""
    return sum(factor.numel() for factor in layer.lora_pair(weight)) // layer.lora_specs[weight].rank


def plan_growth(module: nn.Module, highest: Mapping[str, int], budget: int, threshold: float) -> list[GroupGrowth]:
    """The groups that are to double their rank, those first that use theirs most.

    A group grows if `beyond_half_rank` is at least ``threshold`` and its growth fits into what is left of the budget.

    Args:
        highest: Name of an adapted weight to the rank at which it stops to grow.
        budget: The most parameters of all factors together.
        threshold: Share of the updates, between 0 and 1.
    """
    groups = groups_by_parent(module)
    shares = {group: beyond_half_rank(module, names) for group, names in groups.items()}
    left = budget - num_factor_parameters(module)
    plan = []
    for group in sorted(groups, key=lambda group: -shares[group]):
        growth = _growth(module, group, groups[group], highest, shares[group])
        if shares[group] >= threshold and growth.after and growth.parameters <= left:
            left -= growth.parameters
            plan.append(growth)
    return plan


def num_factor_parameters(module: nn.Module) -> int:
    """Parameters of all factors; those that several layers share count once."""
    return sum(f.numel() for layer, weight in adapted_weights(module).values() for f in layer.lora_pair(weight))


def _growth(
    module: nn.Module, group: str, names: list[str], highest: Mapping[str, int], beyond_half: float
) -> GroupGrowth:
    before, after, parameters = {}, {}, 0
    weights = adapted_weights(module)
    for name in names:
        layer, weight = weights[name]
        rank = layer.lora_specs[weight].rank
        new = min(2 * rank, highest[name])
        if new > rank:
            before[name], after[name] = rank, new
            parameters += (new - rank) * parameters_per_rank(layer, weight)
    return GroupGrowth(group, before, after, beyond_half, parameters)
