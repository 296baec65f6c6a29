"""Adapted linear layers that are given the very same tensor, as query, key and value, computed together.

Nobody says which layers those are: they are seen in use. When the first of them is called again, with whatever tensor,
the outputs of the others are computed with its own and wait until these are called with that tensor. A layer that is
given another one, or was seen to be passed over, computes alone.

What was seen takes effect once no output of the first layer waits for its backward pass: activation checkpointing runs
a block again in there and counts on the same tensors being saved.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.patterns import plain_name

# An adapted linear layer, used by its `adapted_weight` and `lora_dropout`.
_Layer = Any
_Layers = tuple["weakref.ref[_Layer]", ...]


@dataclass
class _Group:
    """Who follows a first layer: ``followers`` in force, ``seen`` last; and the graph nodes of its outputs."""

    followers: _Layers = ()
    seen: _Layers = ()
    is_settled: bool = False
    nodes: list[weakref.ref[Any]] = field(default_factory=list)

    def update(self) -> None:
        """Let what was seen take effect if it may."""
        in_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]
        self.nodes = [ref for ref in self.nodes if (node := ref()) is not None and not node.is_done]
        if not self.nodes and not in_backward:
            self.followers = self.seen


class _Run(threading.local):
    """Calls one after the other with one tensor, and outputs that wait for their layer's call, by its id."""

    x: weakref.ref[Tensor] | None = None
    version: int = -1
    layers: _Layers = ()
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
    is_first = _run.x is None or _run.x() is not x or _run.version != x._version
    if is_first or any(called() is layer for called in _run.layers):
        _learn()
        _run.x, _run.version = weakref.ref(x), x._version
    _run.layers = (*_run.layers, weakref.ref(layer))
    if (made := _run.waiting.pop(id(layer), None)) is not None:
        return made
    if len(_run.layers) > 1:
        return fused_lora_linears(x, [own], layer.lora_dropout)[0]
    group = _groups.setdefault(layer, _Group())
    group.update()
    followers = _ready_followers(group, layer, x)
    y, *others = fused_lora_linears(x, [own, *followers.values()], layer.lora_dropout)
    if y.grad_fn is not None:
        group.nodes.append(weakref.ref(y.grad_fn))
    _run.waiting = dict(zip(followers, others, strict=True))
    return y


def sibling_names(module: nn.Module) -> dict[str, list[str]]:
    """What was seen in ``module``: name of a first layer to those that follow it, none if one was passed over.

    With these a run that goes on elsewhere adds up in the same order from its first step (`restore_siblings`).
    """
    _learn()
    names = {layer: plain_name(name) for name, layer in module.named_modules()}
    return {
        names[leader]: [names[layer] for follower in group.seen if (layer := follower()) in names]
        for leader, group in _groups.items()
        if leader in names and (group.seen or group.is_settled)
    }


def restore_siblings(module: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Take over what was seen elsewhere; names that ``module`` has not are passed over."""
    layers = lora_layers(module)
    for leader, followers in names.items():
        if leader in layers:
            seen = tuple(weakref.ref(layers[name]) for name in followers if name in layers)
            _groups[layers[leader]] = _Group(seen=seen, is_settled=not followers)


def _learn() -> None:
    """End the run, and remember its calls."""
    leader, seen = _run.layers[0]() if _run.layers else None, _run.layers[1:]
    is_incomplete = bool(_run.waiting)
    _run.x, _run.layers, _run.waiting = None, (), {}
    if leader is None:
        return
    group = _groups.setdefault(leader, _Group())
    if is_incomplete:
        # Somebody was not called after all: never again.
        group.seen, group.is_settled = (), True
    elif len(seen) > len(group.seen) and not group.is_settled:
        group.seen = seen


def _ready_followers(group: _Group, leader: _Layer, x: Tensor) -> dict[int, AdaptedWeight]:
    """By id, the layers that will be called with ``x`` next and can be computed now."""
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
