"""Adapted linear layers that are given the very same tensor, as query, key and value, computed together.

Nobody says which layers those are: they are seen in use. When the first of them is called again, with whatever tensor,
the outputs of the others are computed with its own and wait until these are called with that tensor. A layer that is
given another one, or was seen to be passed over, computes alone.

What was seen takes effect once the factors have changed, that is with the next optimizer step: activation checkpointing
runs a block twice within a step and counts on the same tensors being saved.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.functional import AdaptedWeight, fused_lora_linears

# An adapted linear layer: `adapted_weight`, `lora_dropout` and `lora_A` are what is used of it.
_Layer = Any
_Layers = tuple["weakref.ref[_Layer]", ...]


@dataclass
class _Group:
    """Who follows a first layer: ``followers`` in force, ``seen`` last, when the first's factor had ``version``."""

    followers: _Layers
    seen: _Layers
    version: int
    is_settled: bool = False


class _Run(threading.local):
    """Calls one after the other with one tensor, and outputs that wait for their layer's call, by its id.

    Both the tensor and the first layer's factor are known by their version then.
    """

    x: weakref.ref[Tensor] | None = None
    x_version: int = -1
    factor_version: int = -1
    layers: Sequence[weakref.ref[_Layer]] = ()
    waiting: dict[int, Tensor] = {}


_groups: weakref.WeakKeyDictionary[_Layer, _Group] = weakref.WeakKeyDictionary()
_run = _Run()


def sibling_output(layer: _Layer, x: Tensor, own: AdaptedWeight) -> Tensor:
    """Output of ``layer`` for ``x``, computed with its siblings' where it has any and gradients are on.

    Args:
        layer: Who is called.
        x: With what, ``(*, in)``.
        own: The layer's `AdaptedWeight` for ``x``.

    Returns:
        ``(*, out)``.
    """
    if not torch.is_grad_enabled():
        return fused_lora_linears(x, [own], layer.lora_dropout)[0]
    is_first = _run.x is None or _run.x() is not x or _run.x_version != x._version
    if is_first or any(called() is layer for called in _run.layers):
        _learn()
        _run.x, _run.x_version, _run.factor_version = weakref.ref(x), x._version, layer.lora_A._version
        _run.layers, _run.waiting = (), {}
    _run.layers = (*_run.layers, weakref.ref(layer))
    if (made := _run.waiting.pop(id(layer), None)) is not None:
        return made
    followers = _ready_followers(layer, x) if len(_run.layers) == 1 else {}
    y, *others = fused_lora_linears(x, [own, *followers.values()], layer.lora_dropout)
    _run.waiting = dict(zip(followers, others, strict=True))
    return y


def _learn() -> None:
    """Remember the calls of the run that is over."""
    leader = _run.layers[0]() if _run.layers else None
    if leader is None:
        return
    seen, version = tuple(_run.layers[1:]), _run.factor_version
    group = _groups.setdefault(leader, _Group((), (), version))
    if _run.waiting:
        # Somebody was not called after all: never again.
        group.seen, group.version, group.is_settled = (), version, True
    elif len(seen) > len(group.seen) and not group.is_settled:
        group.seen, group.version = seen, version


def _ready_followers(leader: _Layer, x: Tensor) -> dict[int, AdaptedWeight]:
    """By id, the layers that will be called with ``x`` next and can be computed now."""
    group = _groups.get(leader)
    if group is None:
        return {}
    if group.followers != group.seen and leader.lora_A._version != group.version:
        group.followers = group.seen
    found = {id(layer): _ready(layer, leader, x) for follower in group.followers if (layer := follower()) is not None}
    return {key: weight for key, weight in found.items() if weight is not None}


def _ready(layer: _Layer, leader: _Layer, x: Tensor) -> AdaptedWeight | None:
    # A hook may change what the layer computes with; so may a wrapper that gathers its weights (FSDP), until when
    # their storage is empty.
    if layer._forward_pre_hooks or layer.lora_dropout != leader.lora_dropout:
        return None
    weight = layer.adapted_weight(x)
    if weight is None or not all(t.untyped_storage().nbytes() for t in (weight.weight, weight.A, weight.B)):
        return None
    return weight
