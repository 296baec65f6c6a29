"""Adapted weights by layer and role, such as ``layer 11 mlp``, and the spectra of their updates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

import torch
from torch import Tensor, nn

from lightning_lora.lora.functional import effective_rank, singular_values
from lightning_lora.lora.layers.adapted import learning_weights

MAX_GROUPS = 64
"""Groups above this number are joined with their neighbours: each costs two passes over the held-out rows."""


def layer_groups(module: nn.Module) -> dict[str, list[str]]:
    """Names of groups to the names of their adapted weights: by the number in the name, and the role.

    Without a number, or a known role, a weight is a group of its own. Several stacks of layers, such as an encoder and
    a decoder, are named. More than 64 groups are joined with their neighbours: ``layers 4-7 mlp``.
    """
    roles = {name: layer.lora_specs[weight].role for name, (layer, weight) in learning_weights(module).items()}
    highest = max((place[1] for place in map(_place, roles) if place), default=0)
    groups = _joined(roles, 1)
    for width in range(2, highest + 2):
        if len(groups) <= MAX_GROUPS:
            return groups
        groups = _joined(roles, width)
    return groups if len(groups) <= MAX_GROUPS else _by(roles, roles)


def _joined(roles: Mapping[str, str], width: int) -> dict[str, list[str]]:
    """Groups of ``width`` neighbouring layers; above 1, weights without a number or a role are joined by role too."""
    places = {name: _place(name) for name in roles}
    stacks = _stack_names(place[0] for place in places.values() if place)
    last = {stack: max(place[1] for place in places.values() if place and place[0] == stack) for stack in stacks}
    labels = {}
    for name, role in roles.items():
        place = places[name]
        if width == 1 and (place is None or role == "other"):
            labels[name] = name
        elif place is None:
            labels[name] = role
        else:
            stack, first = place[0], place[1] // width * width
            numbers = f"layer {first}" if width == 1 else f"layers {first}-{min(first + width - 1, last[stack])}"
            labels[name] = f"{stacks[stack]} {numbers} {role}".strip()
    return _by(labels, roles)


def _by(labels: Mapping[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(labels[name], []).append(name)
    return groups


def _place(name: str) -> tuple[str, int] | None:
    """The stack of layers and the number in the name of an adapted weight: ``model.layers.3.mlp`` is in a stack."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else (name[: found.start()], int(found[1]))


def _stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """Path of each stack of layers to the part of it that others do not have; empty for a single one."""
    paths = {stack: stack.split(".") for stack in stacks}
    start = _num_common(paths.values())
    rest = {stack: parts[start:] for stack, parts in paths.items()}
    end = _num_common(parts[::-1] for parts in rest.values())
    return {stack: ".".join(parts[: len(parts) - end]) for stack, parts in rest.items()}


def _num_common(paths: Iterable[list[str]]) -> int:
    """Number of parts that all paths begin with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def spectra(module: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Mean rank, stable rank and effective rank of the updates of adapted weights; zero for an update that is zero.

    The stable rank is ``sum s^2 / max s^2``, the effective rank ``exp(entropy(s / sum s))``. They describe an update;
    they do not tell full adapters from others. The rank is that of the trained part (see ``init="pissa"``).
    """
    weights = learning_weights(module)
    ranks, matrices = [], []
    for layer, weight in map(weights.__getitem__, names):
        rows = _matrices(singular_values(*layer.lora_pair(weight), layer.lora_specs[weight].scale))
        ranks += [layer.lora_specs[weight].rank - layer.lora_specs[weight].start] * len(rows)
        matrices += rows
    return {
        "rank": sum(ranks) / len(ranks),
        "stable_rank": sum(map(_stable_rank, matrices)) / len(matrices),
        "effective_rank": sum(map(effective_rank, matrices)) / len(matrices),
    }


def mean_spectrum(module: nn.Module, names: Iterable[str]) -> list[float]:
    """Singular values of the updates of a group, scaled, descending: the mean over its weights of each place."""
    weights = learning_weights(module)
    rows: list[Tensor] = []
    for layer, weight in map(weights.__getitem__, names):
        rows += _matrices(singular_values(*layer.lora_pair(weight), layer.lora_specs[weight].scale))
    length = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in rows]).mean(0).tolist()


def _matrices(values: Tensor) -> list[Tensor]:
    """Singular values of each matrix; experts are matrices of their own."""
    return list(values.detach().reshape(-1, values.shape[-1]).cpu())


def _stable_rank(values: Tensor) -> float:
    return float(values.square().sum() / values.max().square()) if values.max() > 0 else 0.0
