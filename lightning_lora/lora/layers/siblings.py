"""Adapted linear layers with the very same input, as query, key and value, computed together.

Nobody says which layers these are: calls are watched. When the first layer of a group is called again, with whatever
tensor, the outputs of the other layers are computed with its own, and wait until these layers are called with the same
tensor. A layer that is called with another tensor, or was once not called after all, computes alone.

A newly seen group takes effect once no output of its first layer waits for a backward pass: activation checkpointing
runs a block again in that pass and counts on the same tensors being saved.

A compiler reads the code before anything is called. There the groups are those that the source of the model shows
(`targets.called_together`), from the first step on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.functional.torch_internals import (
    in_backward,
    is_compiled_within,
    outermost_compiled_file,
)
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.patterns import plain_name

_HERE = str(Path(__file__).parent)
# An adapted linear layer, of which `adapted_weight` and `lora_dropout` are used.
_Layer = Any
_Layers = tuple["weakref.ref[_Layer]", ...]


@dataclass
class _Group:
    """The layers that are called after a first layer with the same input.

    Args:
        siblings: Layers that are computed together with the first one.
        seen: Layers seen in calls; they become ``siblings`` when that is safe.
        is_settled: Whether ``seen`` stays as it is.
        nodes: Nodes of the graph that computed outputs of the first layer.
    """

    siblings: _Layers = ()
    seen: _Layers = ()
    is_settled: bool = False
    nodes: list[weakref.ref[Any]] = field(default_factory=list)

    def update(self) -> None:
        """Let the layers seen take effect unless a backward pass is running or to come."""
        self.nodes = [ref for ref in self.nodes if (node := ref()) is not None and not node.is_done]
        if not self.nodes and not in_backward():
            self.siblings = self.seen


class _Run(threading.local):
    """Consecutive calls of this thread with the same tensor ``x``, and outputs that wait for their layer's call."""

    x: weakref.ref[Tensor] | None = None
    version: int = -1
    layers: _Layers = ()
    waiting: dict[_Layer, Tensor] = {}


class CompiledGroup:
    """Layers that the code of a function calls one after the other with one variable, for when it is compiled.

    Args:
        layers: The layers in the order of their calls.
        place: File, name, first and last line of the function.

    Attributes:
        x: The input for which outputs wait.
        waiting: Output of each layer, None where it does not wait; empty if none does.
    """

    def __init__(self, layers: Sequence[_Layer], place: tuple[str, str, int, int]) -> None:
        self.layers = tuple(layers)
        self.place = place
        self.x: Tensor | None = None
        self.waiting: tuple[Tensor | None, ...] = ()

    def join(self) -> None:
        """Tell each layer of its group, and of its number there."""
        for number, layer in enumerate(self.layers):
            layer.lora_group = (self, number)


_groups: weakref.WeakKeyDictionary[_Layer, _Group] = weakref.WeakKeyDictionary()
_run = _Run()


def sibling_output(layer: _Layer, x: Tensor, adapted: AdaptedWeight) -> Tensor:
    """Output of ``layer`` for ``x``; with gradients on, it is computed together with the outputs of its siblings.

    Args:
        x: Its input, ``(*, in)``.

    Returns:
        ``(*, out)``.
    """
    if torch.compiler.is_compiling():
        return _compiled_output(layer, x, adapted)
    if not torch.is_grad_enabled():
        return fused_lora_linears(x, [adapted], layer.lora_dropout)[0]
    is_first = _run.x is None or _run.x() is not x or _run.version != x._version
    if is_first or any(called() is layer for called in _run.layers):
        _end_run()
        _run.x, _run.version = weakref.ref(x), x._version
    _run.layers = (*_run.layers, weakref.ref(layer))
    if (output := _run.waiting.pop(layer, None)) is not None:
        return output
    if len(_run.layers) > 1:
        return fused_lora_linears(x, [adapted], layer.lora_dropout)[0]
    group = _groups.setdefault(layer, _Group())
    group.update()
    siblings = _ready_siblings(group, layer, x)
    y, *others = fused_lora_linears(x, [adapted, *siblings.values()], layer.lora_dropout)
    if y.grad_fn is not None:
        group.nodes.append(weakref.ref(y.grad_fn))
    _run.waiting = dict(zip(siblings, others, strict=True))
    return y


def _compiled_output(layer: _Layer, x: Tensor, adapted: AdaptedWeight) -> Tensor:
    """`sibling_output` while a compiler reads the code, where nothing has been called yet."""
    knows_more = torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling()
    # Layers compiled one by one must not differ in what is asked of them: each difference would be compiled again.
    if not knows_more or outermost_compiled_file().startswith(_HERE) or layer.lora_group is None:
        return fused_lora_linears(x, [adapted], layer.lora_dropout)[0]
    group, number = layer.lora_group
    if number and group.x is x and (output := group.waiting[number]) is not None:
        waiting = tuple([None if i == number else y for i, y in enumerate(group.waiting)])
        is_empty = all(y is None for y in waiting)
        group.x, group.waiting = (None, ()) if is_empty else (x, waiting)
        return output
    if number or not is_compiled_within(*group.place):
        return fused_lora_linears(x, [adapted], layer.lora_dropout)[0]
    others = [None if _is_replaced(other) else _adapted_alike(other, layer, x) for other in group.layers[1:]]
    y, *outputs = fused_lora_linears(x, [adapted, *[o for o in others if o is not None]], layer.lora_dropout)
    if outputs:
        rest = iter(outputs)  # which torch 2.10 compiles as a tuple
        group.x, group.waiting = x, (None, *[None if other is None else next(rest) for other in others])
    return y


def _is_replaced(layer: _Layer) -> bool:
    """Whether the layer has a ``forward`` of its own that does not say that it calls that of its class."""
    own = layer.__dict__.get("forward")
    called = own.args if isinstance(own, partial) else ()
    return own is not None and not any(getattr(each, "__func__", None) is type(layer).forward for each in called)


def sibling_names(module: nn.Module) -> dict[str, list[str]]:
    """Groups seen in ``module``: name of each first layer to the names of its siblings; none if one was not called.

    With these names, a run that continues elsewhere adds up in the same order from its first step (`restore_siblings`).
    """
    _end_run()
    names = {layer: plain_name(name) for name, layer in module.named_modules()}
    return {
        names[first]: [names[layer] for sibling in group.seen if (layer := sibling()) in names]
        for first, group in _groups.items()
        if first in names and (group.seen or group.is_settled)
    }


def restore_siblings(module: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Take over groups seen elsewhere, as `sibling_names` returns them; names unknown to ``module`` are ignored."""
    layers = lora_layers(module)
    for first, siblings in names.items():
        if first in layers:
            seen = tuple(weakref.ref(layers[name]) for name in siblings if name in layers)
            _groups[layers[first]] = _Group(seen=seen, is_settled=not siblings)


def _end_run() -> None:
    """End the run of calls with one tensor, and remember which layers were called."""
    first, seen = _run.layers[0]() if _run.layers else None, _run.layers[1:]
    is_incomplete = bool(_run.waiting)
    _run.x, _run.layers, _run.waiting = None, (), {}
    if first is None:
        return
    group = _groups.setdefault(first, _Group())
    if is_incomplete:
        # A sibling was not called after all, so its output was computed for nothing: never again.
        group.seen, group.is_settled = (), True
    elif len(seen) > len(group.seen) and not group.is_settled:
        group.seen = seen


def _ready_siblings(group: _Group, first: _Layer, x: Tensor) -> dict[_Layer, AdaptedWeight]:
    """Siblings that can be computed together with ``first`` now, each with its `AdaptedWeight` for ``x``."""
    ready = {layer: _ready(layer, first, x) for sibling in group.siblings if (layer := sibling()) is not None}
    return {layer: adapted for layer, adapted in ready.items() if adapted is not None}


def _ready(layer: _Layer, first: _Layer, x: Tensor) -> AdaptedWeight | None:
    adapted = _adapted_alike(layer, first, x)
    # A wrapper that gathers weights (FSDP) leaves their storage empty until the layer is called.
    if adapted is None or not all(t.untyped_storage().nbytes() for t in (adapted.weight, adapted.A, adapted.B)):
        return None
    return adapted


def _adapted_alike(layer: _Layer, first: _Layer, x: Tensor) -> AdaptedWeight | None:
    # A hook may change what the layer computes with.
    is_other = layer._forward_pre_hooks or layer.lora_dropout != first.lora_dropout
    return None if is_other else layer.adapted_weight(x)
