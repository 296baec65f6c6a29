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
    affine_into,
    by_layer,
    group_gradients,
    new_output,
    scaled,
)


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
