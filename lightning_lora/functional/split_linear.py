"""``x W^T + b + scale * x A^T B^T`` with the small product first and the large one added to it.

Shape legend: ``T`` rows of input (all leading axes together), ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.functional.linear_group import (
    Parts,
    Settings,
    by_layer,
    differentiable_gradients,
    factor_gradients,
    inner_gradient,
    scaled,
)
from lightning_lora.functional.origin import remade, source_gradients
from lightning_lora.functional.seeded_dropout import drop


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
            # Made whole and written through a view: autograd lets nobody change an output in place that is a view.
            outputs.append(x.new_empty(*x.shape[:-1], weight.shape[0]))
            y = outputs[-1].view(-1, weight.shape[0])
            if bias is None:
                torch.mm(small, B.T, out=y)
            else:
                torch.addmm(bias, small, B.T, out=y)
            torch.addmm(y, rows, weight.T, out=y)
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
        if all(d is None for d in d_outputs):
            return (None,) * len(ctx.needs_input_grad)
        settings: Settings = ctx.settings
        inner, *saved = ctx.saved_tensors
        parts, needs = Parts.of(saved, settings), Parts.of(ctx.needs_input_grad[2:], settings)
        d_ys = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_outputs]
        if torch.is_grad_enabled():
            return None, None, *differentiable_gradients(settings, parts, d_ys, needs)
        x, activated = remade(settings.origin, parts.sources)
        d_inner = inner_gradient(d_ys, parts.Bs)
        dropped = None if x is None else drop(x.reshape(-1, x.shape[-1]), settings.dropout, settings.seed)
        d_As, d_Bs = factor_gradients(settings, needs, parts.As, dropped, inner, d_inner, d_ys)
        nothing = [None] * len(parts.As)
        gradients = Parts(nothing, nothing, d_As, d_Bs, [None] * len(parts.sources))
        if any(needs.sources):
            d_x = drop(d_inner @ scaled(parts.As, settings), settings.dropout, settings.seed)
            for d_y, weight in zip(d_ys, parts.weights, strict=True):
                if d_y is not None:
                    torch.addmm(d_x, d_y, weight, out=d_x)
            d_sources = source_gradients(settings.origin, parts.sources, d_x.view(ctx.shape), activated)
            gradients = gradients._replace(sources=d_sources)
        return None, None, *gradients.flat()
