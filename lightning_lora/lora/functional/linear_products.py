"""``x W^T + b + scale * x A^T B^T`` with the small product first and the large one added to it.

Shape legend: ``T`` rows of input (all leading axes together), ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.lora.functional.linear_group import (
    Parts,
    Settings,
    affine_into,
    by_layer,
    group_gradients,
    new_output,
    scaled,
)
from lightning_lora.lora.functional.seeded_dropout import drop


class SplitLinears(torch.autograd.Function):
    """Takes settings, the value of the input if its sources are not it, and the group's `Parts`; keeps ``(T, R)``.

    The node in the graph has ``is_done``: whether its backward pass has run.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, value: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        """``(*, out)`` of each layer."""
        parts = Parts.of(tensors, settings)
        x: Tensor = parts.sources[0] if value is None else value
        rows = x.reshape(-1, x.shape[-1])
        inner = drop(rows, settings.dropout, settings.seed) @ scaled(parts.As, settings).T
        outputs = []
        for small, weight, bias, B in zip(
            by_layer(inner, parts.As), parts.weights, parts.biases, parts.Bs, strict=True
        ):
            output, y = new_output(x, weight)
            affine_into(y, small, B.T, bias)
            torch.addmm(y, rows, weight.T, out=y)
            outputs.append(output)
        needs = Parts.of(ctx.needs_input_grad[2:], settings)
        keeps_input = any(needs.As) or (settings.origin is not None and any(needs.sources))
        kept = parts if keeps_input else parts._replace(sources=[None] * len(parts.sources))
        ctx.settings, ctx.shape, ctx.is_done = settings, x.shape, False
        ctx.save_for_backward(inner, *kept.flat())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        """Gradients of whatever asks for one."""
        ctx.is_done = True
        inner, *saved = ctx.saved_tensors
        return group_gradients(ctx, Parts.of(saved, ctx.settings), inner, None, d_outputs)


class MergedLinears(torch.autograd.Function):
    """As `SplitLinears`, without dropout; keeps a sum ``(out, in)`` a layer instead of ``(T, R)``."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, value: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        """``(*, out)`` of each layer."""
        parts = Parts.of(tensors, settings)
        x: Tensor = parts.sources[0] if value is None else value
        rows = x.reshape(-1, x.shape[-1])
        factors = by_layer(scaled(parts.As, settings), parts.As, dim=0)
        sums = [torch.addmm(W, B, A) for W, B, A in zip(parts.weights, parts.Bs, factors, strict=True)]
        outputs = []
        for weight, bias in zip(sums, parts.biases, strict=True):
            output, y = new_output(x, weight)
            affine_into(y, rows, weight.T, bias)
            outputs.append(output)
        ctx.settings, ctx.shape, ctx.is_done = settings, x.shape, False
        ctx.save_for_backward(*sums, *parts.flat())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        """Gradients of whatever asks for one."""
        ctx.is_done = True
        num_layers = len(ctx.settings.scales)
        sums, saved = ctx.saved_tensors[:num_layers], ctx.saved_tensors[num_layers:]
        return group_gradients(ctx, Parts.of(saved, ctx.settings), None, sums, d_outputs)
