r"""A linear layer and its low-rank update as one differentiable function.

The update costs little arithmetic; what makes LoRA slow is everything around it. Written out, ``W x + s B A x`` walks
over the output twice more than ``W x`` does, over the gradient of the input twice more, and with dropout over the input
four times more. Here the small product comes first and the large one adds itself to it (``beta = 1`` in BLAS), forward
and backward, and dropout keeps no mask but the seed of one.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.functional.seeded_dropout import drop, kept_share, shared_seed


def fused_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    r"""``x W^T + b + scale * drop(x) A^T B^T``, with gradients for ``x``, ``A`` and ``B``; ``W`` and ``b`` are frozen.

    For the backward pass it keeps ``x``, by reference, and ``A x``, ``(T, r)``; with dropout a seed instead of a mask.
    The gradient can be differentiated again. All tensors have one type.

    Args:
        x: ``(*, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: alpha / r, dimensionless.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``, rounded to a multiple of 1/256, at least
            one; what is kept is scaled by the exact probability of keeping it. Calls with the same ``x``, one after the
            other, drop the same entries.

    Returns:
        ``(*, out)``.

    References:
        Zhu et al., *LoRAFusion*, 2025, https://arxiv.org/abs/2510.00206 (fusing, seeded dropout).
    """
    seed = shared_seed(x, A) if dropout else 0
    return _FusedLoRALinear.apply(x, weight, bias, A, B, scale / kept_share(dropout), dropout, seed)


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `fused_lora_linear` computes what the written-out formula does for these tensors, here and now.

    Not where types differ or autocast chooses them, where base weights learn, in quantised or sharded ones, and where
    ``torch.compile`` or a transform of ``torch.func`` must see through: those take the formula.
    """
    frozen = [weight] if bias is None else [weight, bias]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad for tensor in frozen)
        and all(tensor.dtype == x.dtype for tensor in frozen)
        and type(x) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _FusedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = drop(rows, dropout, seed) @ A.T
        inner *= scale
        # Made whole and written through a view: autograd lets nobody change an output in place that is a view itself.
        output = x.new_empty(*x.shape[:-1], weight.shape[0])
        y = output.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(inner, B.T, out=y)
        else:
            torch.addmm(bias, inner, B.T, out=y)
        torch.addmm(y, rows, weight.T, out=y)
        ctx.save_for_backward(x, weight, A, B, inner)
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, A, B, inner = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        rows, d_y = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, weight.shape[0])
        if torch.is_grad_enabled():
            # To be differentiated again: what was saved of the forward pass is no function of its inputs here.
            inner = drop(rows, ctx.dropout, ctx.seed) @ A.T * ctx.scale
        d_inner = d_y @ B * ctx.scale
        d_A = d_inner.T @ drop(rows, ctx.dropout, ctx.seed) if needs_A else None
        d_B = d_y.T @ inner if needs_B else None
        d_x = None
        if needs_x:
            d_x = drop(d_inner @ A, ctx.dropout, ctx.seed)
            d_x = torch.addmm(d_x, d_y, weight, out=None if torch.is_grad_enabled() else d_x).view(x.shape)
        return d_x, None, None, d_A, d_B, None, None, None
