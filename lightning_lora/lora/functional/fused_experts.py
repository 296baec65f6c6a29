r"""The product of each expert and its low-rank update as one differentiable function, on rows sorted by expert.

No expert's ``B A`` is formed, nothing is concatenated: every expert writes its rows of the output, the small product
first and the large one added to it, forward and backward.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.gated_input import Origin, origin, remade, source_gradients
from lightning_lora.lora.functional.linear_group import affine_into, gradients_of
from lightning_lora.lora.functional.narrow_products import laid_out, transposed_times_narrow
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share, shared_seed


def fused_expert_linear(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    counts: list[int],
    dropout: float = 0.0,
) -> Tensor:
    r"""``x_e W_e^T + b_e + scale * drop(x_e) A_e^T B_e^T``, with gradients for ``x``, ``A`` and ``B``.

    What is kept for the backward pass, and what dropout does, is as in `fused_lora_linears`; so is when it may be used
    (`can_fuse`). The gradient can be differentiated again.

    Args:
        x: ``(rows, in)``, sorted by expert.
        weights: ``(E, out, in)``, frozen.
        bias: ``(E, out)`` or None, frozen.
        A: ``(E, r, in)``, or ``(1, r, in)`` shared by all experts.
        B: ``(E, out, r)``, or ``(1, out, r)``.
        scale: alpha / r, dimensionless.
        counts: Rows of each expert.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``.

    Returns:
        ``(rows, out)``.
    """
    seed = shared_seed(x, A) if dropout else 0
    made = origin(x)
    value, sources = (None, (x,)) if made is None else (x.detach(), made.tensors)
    kind = None if made is None else made._replace(tensors=())
    settings = _Settings(scale / kept_share(dropout), counts, dropout, seed, kind)
    return _FusedExpertLinear.apply(settings, value, weights, bias, A, B, *sources)


class _Settings(NamedTuple):
    """What is no tensor; how the input came about is without its tensors."""

    scale: float
    counts: list[int]
    dropout: float
    seed: int
    origin: Origin | None


class _FusedExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        value: Tensor | None,
        weights: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        *sources: Tensor,
    ) -> Tensor:
        x = sources[0] if value is None else value
        counts, scaled = settings.counts, _each(A * settings.scale, settings.counts)
        inner, y = x.new_empty(len(x), A.shape[1]), x.new_empty(len(x), B.shape[1])
        rows = [t.split(counts) for t in (x, drop(x, settings.dropout, settings.seed), inner, y)]
        biases = [None] * len(counts) if bias is None else bias.unbind()
        for x_e, dropped, inner_e, y_e, W, b, A_e, B_e in zip(
            *rows, weights.unbind(), biases, scaled, _each(B, counts), strict=True
        ):
            if len(x_e):
                torch.mm(dropped, A_e.T, out=inner_e)
                affine_into(y_e, inner_e, B_e.T, b)
                torch.addmm(y_e, x_e, W.T, out=y_e)
        ctx.settings = settings
        ctx.save_for_backward(inner, weights, A, B, *sources)
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        settings: _Settings = ctx.settings
        inner, weights, A, B, *sources = ctx.saved_tensors
        _, _, _, _, needs_A, needs_B, *needs_sources = ctx.needs_input_grad
        (d_y,) = d_outputs
        x, activated = remade(settings.origin, sources)
        assert x is not None
        dropped = drop(x, settings.dropout, settings.seed)
        if torch.is_grad_enabled():
            y = expert_linear(x, weights, settings.counts) + expert_update(
                dropped, A, B, settings.scale, settings.counts
            )
            d_A, d_B, *d_sources = gradients_of([(y, d_y)], [A, B, *sources], [needs_A, needs_B, *needs_sources])
            return None, None, None, None, d_A, d_B, *d_sources
        counts, d_inner, nothing = settings.counts, torch.empty_like(inner), [None] * len(weights)
        d_A, d_B = (torch.zeros_like(factor) if needs else None for factor, needs in ((A, needs_A), (B, needs_B)))
        rows = [t.split(counts) for t in (d_y, dropped, inner, d_inner)]
        factors = (nothing if factor is None else _each(factor, counts) for factor in (d_A, d_B))
        for d_y_e, dropped_e, inner_e, d_inner_e, B_e, d_A_e, d_B_e in zip(
            *rows, _each(laid_out(B), counts), *factors, strict=True
        ):
            if len(d_y_e):
                torch.mm(d_y_e, B_e, out=d_inner_e)
                if d_A_e is not None:
                    d_A_e.addmm_(d_inner_e.T, dropped_e, alpha=settings.scale)
                if d_B_e is not None:
                    d_B_e += transposed_times_narrow(d_y_e, inner_e)
        d_sources: Sequence[Tensor | None] = [None] * len(sources)
        if any(needs_sources):
            d_x = torch.empty_like(x)
            for d_x_e, d_inner_e, A_e in zip(
                d_x.split(counts), rows[-1], _each(A * settings.scale, counts), strict=True
            ):
                torch.mm(d_inner_e, A_e, out=d_x_e)
            d_x = drop(d_x, settings.dropout, settings.seed)
            for d_x_e, d_y_e, W in zip(d_x.split(counts), rows[0], weights.unbind(), strict=True):
                if len(d_x_e):
                    torch.addmm(d_x_e, d_y_e, W, out=d_x_e)
            d_sources = source_gradients(settings.origin, sources, d_x, activated)
        return None, None, None, None, d_A, d_B, *d_sources


def _each(factors: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """The factor of each expert, which may be one that all share."""
    return factors.unbind() if factors.shape[0] > 1 else [factors[0]] * len(counts)
