r"""The product of each expert and its low-rank update as one differentiable function, on rows sorted by expert.

The large product is the base's own, in one call for all experts, forward and backward, and the small one is added to
it. No expert's ``B A`` is formed. How experts get their rows is `ExpertRows`.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.lora.functional.expert_rows import ExpertRows
from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.gated_input import gated_input, recomputed, source_gradients
from lightning_lora.lora.functional.linear_group import AdaptedWeight
from lightning_lora.lora.functional.linear_products import gradients_of
from lightning_lora.lora.functional.narrow_products import fast_layout, is_slow
from lightning_lora.lora.functional.seeded_dropout import Seed, drop, kept_share, shared_seed
from lightning_lora.lora.functional.torch_internals import uninitialised, whole

Product = Callable[[Tensor, Tensor], Tensor]


def fused_expert_linear(
    x: Tensor, adapted: AdaptedWeight, rows: ExpertRows, dropout: float = 0.0, product: Product | None = None
) -> Tensor:
    r"""``x_e W_e^T + scale * drop(x_e) A_e^T B_e^T``, with gradients for ``x``, ``A`` and ``B``.

    What it keeps for the backward pass, what dropout does and when it may be used (`can_fuse`) is as in
    `fused_lora_linears`; but ``A`` and ``B`` may have another type than ``x``, to which they are cast once. The
    gradient can be differentiated again, which reads the rows of each expert.

    Args:
        x: ``(rows, in)``, sorted by expert.
        adapted: Weights and factors of all experts; the caller adds the bias.
        rows: Which rows belong to which expert. What the result holds in rows of no expert is up to ``product``.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``.
        product: How the base multiplies rows sorted by expert by ``(E, in, out)``; None: as ``rows`` does.

    Returns:
        ``(rows, out)``.
    """
    weights, _, A, B, scale, caller, keeps_gate = adapted
    seed = shared_seed(x, [caller]) if dropout else 0
    activation, sources = (None if keeps_gate else gated_input(x)) or (None, (x,))
    settings = _Settings(scale / kept_share(dropout), rows, product or rows.times, dropout, seed, activation)
    return _FusedExperts.apply(settings, x.detach(), weights, A, B, *sources)


class _Settings(NamedTuple):
    """What the computation depends on besides tensors, as in `Settings`; rows of experts, and the base's product."""

    scale: float
    rows: ExpertRows
    product: Product
    dropout: float
    seed: Seed
    activation: str | None

    def drop(self, x: Tensor) -> Tensor:
        """``x`` as the update sees it, but for the scale."""
        return drop(x, self.dropout, self.seed)


class _FusedExperts(torch.autograd.Function):
    """``(rows, out)`` from settings and tensors; the input comes detached, for gradients go to its sources."""

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, weights: Tensor, A: Tensor, B: Tensor, *sources: Tensor
    ) -> Tensor:
        rows, factors = settings.rows, _factors_for(settings.rows, x, A, B)
        y, inner = whole(settings.product(x, weights.mT)), rows.times(settings.drop(x), factors[0].mT)
        rows.add_times(y, inner, factors[1].mT, settings.scale)
        ctx.settings = settings
        ctx.save_for_backward(inner, weights, *factors, A, B, *sources)
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        settings: _Settings = ctx.settings
        inner, weights, A, B, own_A, own_B, *sources = ctx.saved_tensors
        _, _, _, needs_A, needs_B, *needs_sources = ctx.needs_input_grad
        (d_y,) = d_outputs
        x, activated = recomputed(settings.activation, sources)
        assert x is not None
        dropped = settings.drop(x)
        if torch.is_grad_enabled():
            counts = settings.rows.counts
            used = sum(counts)
            y = expert_linear(x[:used], weights, counts)
            y = y + expert_update(dropped[:used], own_A, own_B, settings.scale, counts)
            gradients = gradients_of([(y, d_y[:used])], [own_A, own_B, *sources], [needs_A, needs_B, *needs_sources])
            return None, None, None, *gradients
        rows, d_y = settings.rows, d_y.contiguous()
        d_inner = rows.times(d_y, fast_layout(B))
        d_A = rows.between(d_inner, dropped, len(A)) if needs_A else None
        d_B = _between_narrow(rows, d_y, inner, len(B)) if needs_B else None
        d_sources: Sequence[Tensor | None] = [None] * len(sources)
        if any(needs_sources):
            d_x = _input_gradient(settings, weights, A, d_inner, d_y)
            d_sources = source_gradients(settings.activation, sources, d_x, activated)
        return None, None, None, *_own_gradients([d_A, d_B], [own_A, own_B], settings.scale), *d_sources


def _factors_for(rows: ExpertRows, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` in the type of ``x``, with zeros up to the rank that products of ``rows`` take."""
    rank = rows.padded_rank(A.shape[1], x.dtype)
    if A.dtype == B.dtype == x.dtype and rank == A.shape[1]:
        return A, B
    shapes = (len(A), rank, A.shape[2]), (len(B), B.shape[1], rank)
    if rank == A.shape[1]:
        cast_A, cast_B = (uninitialised(x, shape) for shape in shapes)
    else:
        cast_A, cast_B = (x.new_zeros(shape) for shape in shapes)
    torch._foreach_copy_([cast_A[:, : A.shape[1]], cast_B[..., : A.shape[1]]], [A, B])
    return cast_A, cast_B


def _between_narrow(rows: ExpertRows, d_y: Tensor, inner: Tensor, num_matrices: int) -> Tensor:
    """``d_y_e^T inner_e``, ``(num_matrices, out, r)``, in the order that is fastest."""
    if is_slow(inner):
        return rows.between(inner, d_y, num_matrices).mT
    return rows.between(d_y, inner, num_matrices)


def _input_gradient(settings: _Settings, weights: Tensor, A: Tensor, d_inner: Tensor, d_y: Tensor) -> Tensor:
    """Gradient of ``x``, ``(rows, in)``."""
    d_x = settings.product(d_y, weights)
    if settings.dropout:
        return d_x.add_(settings.drop(settings.rows.times(d_inner, A)), alpha=settings.scale)
    settings.rows.add_times(d_x, d_inner, A, settings.scale)
    return d_x


def _own_gradients(
    gradients: Sequence[Tensor | None], factors: Sequence[Tensor], scale: float
) -> Sequence[Tensor | None]:
    """``scale`` times the gradients of factors that were cast and padded, in the type and shape of the factors."""
    pairs = zip(gradients, factors, strict=True)
    needed = [(d[:, : factor.shape[1], : factor.shape[2]], factor) for d, factor in pairs if d is not None]
    parts = own = [d for d, _ in needed]
    if any(d.dtype != factor.dtype for d, factor in needed):
        own = [uninitialised(factor, factor.shape) for _, factor in needed]
        torch._foreach_copy_(own, parts)
    if own:
        torch._foreach_mul_(own, scale)
    found = iter(own)
    return [None if d is None else next(found) for d in gradients]
