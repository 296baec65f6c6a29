"""Layers of several arms as one: the frozen product once on all rows, then the update of each arm on its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.lora.functional import can_fuse, linear_update, product_type
from lightning_lora.lora.functional.torch_internals import saved_tensor_hooks
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.class_swap import base_type
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.study.bank.exactness import RECOMPUTES, output_layer
from lightning_lora.study.bank.joining import CannotJoinError, Rows


class RowUpdates(torch.autograd.Function):
    """``x W^T + b``, and on the rows of each arm ``+ scale x A^T B^T``: ``(rows, in)`` to ``(rows, out)``.

    ``W`` and ``b`` are frozen. Slices, not masks: a NaN in the rows of one arm reaches no other arm.
    """

    @staticmethod
    def forward(
        ctx: Any, counts: Sequence[int], scales: Sequence[float], x: Tensor, W: Tensor, b: Tensor | None, *pairs: Any
    ) -> Tensor:
        """``pairs`` are ``A`` and ``B`` of each arm, None where an arm does not adapt the layer."""
        y, inner = F.linear(x, W, b), []
        for arm, (x_of, y_of) in enumerate(zip(x.split([*counts]), y.split([*counts]), strict=True)):
            A, B = pairs[2 * arm : 2 * arm + 2]
            inner.append(None if A is None else x_of @ A.T)
            if A is not None:
                y_of.addmm_(inner[-1], B.T, alpha=scales[arm])
        ctx.counts, ctx.scales = counts, scales
        ctx.save_for_backward(x, W, *inner, *pairs)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of ``x`` and of the factors."""
        (d_y,), (x, W, *saved) = d_outputs, ctx.saved_tensors
        counts, scales = ctx.counts, ctx.scales
        inner, pairs = saved[: len(counts)], saved[len(counts) :]
        d_x = d_y @ W if ctx.needs_input_grad[2] else None
        d_pairs: list[Tensor | None] = []
        start = 0
        for arm, count in enumerate(counts):
            own = slice(start, start := start + count)
            A, B = pairs[2 * arm : 2 * arm + 2]
            if A is None:
                d_pairs += [None, None]
                continue
            d_inner = (d_y[own] @ B).mul_(scales[arm])
            if d_x is not None:
                d_x[own].addmm_(d_inner, A)
            d_pairs += [d_inner.T @ x[own], (d_y[own].T @ inner[arm]).mul_(scales[arm])]
        return None, None, d_x, None, None, *d_pairs


@dataclass(eq=False)
class Head:
    """An output layer that each arm computes in its own way, after the joint pass, from its rows of the input.

    Args:
        layers: The layer of each arm, whose ``forward`` somebody has replaced, as `compute_at_head` does.
    """

    layers: list[nn.Module]
    hidden: Tensor | None = None
    marker: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Remember the input, ``(rows, tokens, in)``; the result stands for the output in what the model returns."""
        if self.marker is not None:
            raise CannotJoinError("it calls its output layer twice")
        self.hidden, self.marker = hidden, hidden.new_zeros(len(hidden), 1, 1)
        return self.marker


@contextmanager
def joint_layers(roots: Sequence[nn.Module], rows: Rows, is_joint: bool = True) -> Iterator[list[Head]]:
    """Within the context, the first root computes for the rows of all arms; yields the output layers left to the arms.

    Args:
        roots: The module of each arm, of the same structure; frozen weights have the same values.
        is_joint: False: layers stay as they are, except for those that are left to the arms.
    """
    before: list[tuple[nn.Module, Any]] = []
    head = output_layer(roots[0])
    heads: list[Head] = []
    apart: list[str] = []
    try:
        for name, module in roots[0].named_modules():
            layers = [root.get_submodule(name) for root in roots]
            if name and any(name.startswith(f"{above}.") for above in apart):
                continue  # the layer above it is called once for each arm
            forward: Any = None
            if name and module is head and "forward" in module.__dict__:
                heads.append(Head(layers))
                forward = heads[-1].forward
            elif name and is_joint and any(map(_is_own, layers)):
                is_linear = all(map(_is_linear, layers))
                forward = partial(_linear if is_linear else _one_by_one, layers, rows)
                apart += [] if is_linear else [name]
            if forward is not None:
                before.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = forward
        yield heads
    finally:
        for module, replaced in before:
            if replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = replaced


def _is_own(layer: nn.Module) -> bool:
    """Whether a layer is not the same in all arms."""
    return isinstance(layer, LoRALayer) or any(p.requires_grad for p in layer.parameters(recurse=False))


def _is_linear(layer: nn.Module) -> bool:
    kind: Any = type(layer)
    if isinstance(layer, LoRALinear):
        return kind.forward is LoRALinear.forward and base_type(kind).forward is nn.Linear.forward
    return kind.forward is nn.Linear.forward and not any(p.requires_grad for p in layer.parameters())


def _linear(layers: Sequence[Any], rows: Rows, x: Tensor) -> Tensor:
    """The output of a linear layer, ``(rows, *, out)``, for ``x`` ``(rows, *, in)``."""
    _refuse_recomputing()
    W, b = layers[0].weight, layers[0].bias
    active = [layer if isinstance(layer, LoRALinear) and layer.lora_active else None for layer in layers]
    scales = [0.0 if layer is None else layer.lora_spec.scale for layer in active]
    pairs = [(None, None) if layer is None else layer.linear_factors() for layer in active]
    parts = rows.split(x)
    if can_fuse(x, W, b) and x.dtype == W.dtype == product_type(x):
        counts = [part.numel() // x.shape[-1] for part in parts]
        factors = [None if factor is None else factor.to(x.dtype) for pair in pairs for factor in pair]
        y: Any = RowUpdates.apply(counts, scales, x.reshape(-1, x.shape[-1]), W, b, *factors)
        return y.view(*x.shape[:-1], len(W))
    ys = rows.split(F.linear(x, W, b))
    return torch.cat(
        [
            y if A is None or B is None else y + linear_update(part, A, B, scale).to(y.dtype)
            for y, part, (A, B), scale in zip(ys, parts, pairs, scales, strict=True)
        ]
    )


def _refuse_recomputing() -> None:
    """Refuse activation checkpointing around a layer of several arms, which it would compute again as that of one."""
    if saved_tensor_hooks() is not None or not torch.is_grad_enabled():
        raise CannotJoinError(RECOMPUTES)


def _one_by_one(layers: Sequence[nn.Module], rows: Rows, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer of another kind: that of each arm for its own rows."""
    _refuse_recomputing()
    positional = [rows.split(x) if isinstance(x, Tensor) else [x] * len(layers) for x in args]
    named = {name: rows.split(x) if isinstance(x, Tensor) else [x] * len(layers) for name, x in kwargs.items()}
    outputs = []
    for arm, layer in enumerate(layers):
        kind: Any = type(layer)  # not the layer itself: the forward of the first one is this function
        own = {name: parts[arm] for name, parts in named.items()}
        outputs.append(kind.forward(layer, *(parts[arm] for parts in positional), **own))
    if not all(isinstance(output, Tensor) for output in outputs):
        raise CannotJoinError(f"{type(layers[0]).__name__} returns more than a tensor")
    return torch.cat(outputs)
