"""``x (W + scale B A)^T + b`` with the sum formed once: for many tokens through a small layer.

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
            # Made whole and written through a view: autograd lets nobody change an output in place that is a view.
            outputs.append(x.new_empty(*x.shape[:-1], weight.shape[0]))
            y = outputs[-1].view(-1, weight.shape[0])
            if bias is None:
                torch.mm(rows, weight.T, out=y)
            else:
                torch.addmm(bias, rows, weight.T, out=y)
        ctx.settings, ctx.shape, ctx.is_done = settings, x.shape, False
        ctx.save_for_backward(*sums, *parts.flat())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        """Gradients of whatever asks for one."""
        ctx.is_done = True
        if all(d is None for d in d_outputs):
            return (None,) * len(ctx.needs_input_grad)
        settings: Settings = ctx.settings
        num_layers = len(settings.scales)
        sums, parts = ctx.saved_tensors[:num_layers], Parts.of(ctx.saved_tensors[num_layers:], settings)
        needs = Parts.of(ctx.needs_input_grad[2:], settings)
        d_ys = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_outputs]
        if torch.is_grad_enabled():
            return None, None, *differentiable_gradients(settings, parts, d_ys, needs)
        x, activated = remade(settings.origin, parts.sources)
        assert x is not None
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ scaled(parts.As, settings).T if any(needs.Bs) else None
        d_inner = inner_gradient(d_ys, parts.Bs)
        d_As, d_Bs = factor_gradients(settings, needs, parts.As, rows, inner, d_inner, d_ys)
        nothing = [None] * len(parts.As)
        gradients = Parts(nothing, nothing, d_As, d_Bs, [None] * len(parts.sources))
        if any(needs.sources):
            d_x = None
            for d_y, weight in zip(d_ys, sums, strict=True):
                if d_y is not None:
                    d_x = d_y @ weight if d_x is None else torch.addmm(d_x, d_y, weight, out=d_x)
            assert d_x is not None
            d_sources = source_gradients(settings.origin, parts.sources, d_x.view(ctx.shape), activated)
            gradients = gradients._replace(sources=d_sources)
        return None, None, *gradients.flat()
