r"""The product of each expert and its low-rank update as one differentiable function, on rows sorted by expert.

The large product is the base's own, in one call for all experts, forward and backward; every expert adds the small
product to its rows as it is computed. No expert's ``B A`` is formed.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.gated_input import gated_input, recomputed, source_gradients
from lightning_lora.lora.functional.linear_group import AdaptedWeight
from lightning_lora.lora.functional.linear_products import gradients_of
from lightning_lora.lora.functional.narrow_products import fast_layout, transposed_times_narrow
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share, shared_seed
from lightning_lora.lora.functional.torch_internals import uninitialised, whole

Product = Callable[[Tensor, Tensor], Tensor]


def fused_expert_linear(
    x: Tensor, adapted: AdaptedWeight, counts: list[int], dropout: float = 0.0, product: Product | None = None
) -> Tensor:
    r"""``x_e W_e^T + scale * drop(x_e) A_e^T B_e^T``, with gradients for ``x``, ``A`` and ``B``.

    What it keeps for the backward pass, what dropout does and when it may be used (`can_fuse`) is as in
    `fused_lora_linears`. The gradient can be differentiated again.

    Args:
        x: ``(rows, in)``, sorted by expert. Rows beyond the sum of ``counts`` belong to no expert; what the result
            holds there is up to ``product``.
        adapted: Weights and factors of all experts; the caller adds the bias.
        counts: Rows of each expert.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``.
        product: How the base multiplies rows sorted by expert by ``(E, in, out)``; None: expert after expert.

    Returns:
        ``(rows, out)``.
    """
    weights, _, A, B, scale, caller = adapted
    seed = shared_seed(x, [caller]) if dropout else 0
    activation, sources = gated_input(x) or (None, (x,))
    product = product or (lambda rows, matrices: expert_linear(rows, matrices.mT, counts))
    settings = _Settings(scale / kept_share(dropout), counts, product, dropout, seed, activation)
    return _FusedExperts.apply(settings, x.detach(), weights, A, B, *sources)


class _Settings(NamedTuple):
    """What the computation depends on besides tensors, as in `Settings`; the base's product, and rows of experts."""

    scale: float
    counts: list[int]
    product: Product
    dropout: float
    seed: int
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
        y, inner = whole(settings.product(x, weights.mT)), uninitialised(x, (len(x), A.shape[1]))
        rows, factors = (settings.drop(x), inner, y), ((A * settings.scale).mT, B.mT)
        for dropped, inner_e, y_e, A_e, B_e in _by_expert(settings.counts, rows, factors):
            torch.mm(dropped, A_e, out=inner_e)
            y_e.addmm_(inner_e, B_e)
        ctx.settings = settings
        ctx.save_for_backward(inner, weights, A, B, *sources)
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        settings: _Settings = ctx.settings
        inner, weights, A, B, *sources = ctx.saved_tensors
        _, _, _, needs_A, needs_B, *needs_sources = ctx.needs_input_grad
        (d_y,) = d_outputs
        x, activated = recomputed(settings.activation, sources)
        assert x is not None
        dropped = settings.drop(x)
        if torch.is_grad_enabled():
            used = sum(settings.counts)
            y = expert_linear(x[:used], weights, settings.counts)
            y = y + expert_update(dropped[:used], A, B, settings.scale, settings.counts)
            gradients = gradients_of([(y, d_y[:used])], [A, B, *sources], [needs_A, needs_B, *needs_sources])
            return None, None, None, *gradients
        d_inner, d_A, d_B = _factor_gradients(settings, (A, B, dropped, inner), d_y, (needs_A, needs_B))
        d_sources: Sequence[Tensor | None] = [None] * len(sources)
        if any(needs_sources):
            d_x = _input_gradient(settings, weights, A, d_inner, d_y)
            d_sources = source_gradients(settings.activation, sources, d_x, activated)
        return None, None, None, d_A, d_B, *d_sources


def _factor_gradients(
    settings: _Settings, tensors: tuple[Tensor, Tensor, Tensor, Tensor], d_y: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``scale A_e x_e``, ``(rows, r)``, of ``A`` and of ``B``.

    Args:
        settings: Settings of the product.
        tensors: ``A``, ``B``, the dropped input ``(rows, in)``, and ``scale A_e x_e``.
        d_y: Gradient of the output, ``(rows, out)``.
        needs: Whether ``A`` and ``B`` need a gradient; None is returned for the one that does not.
    """
    A, B, dropped, inner = tensors
    d_inner = uninitialised(inner, inner.shape)
    d_A, d_B = (torch.zeros_like(factor) if needed else None for factor, needed in zip((A, B), needs, strict=True))
    rows, factors = (d_y, dropped, inner, d_inner), (fast_layout(B), d_A, d_B)
    for d_y_e, dropped_e, inner_e, d_inner_e, B_e, d_A_e, d_B_e in _by_expert(settings.counts, rows, factors):
        torch.mm(d_y_e, B_e, out=d_inner_e)
        if d_A_e is not None:
            d_A_e.addmm_(d_inner_e.T, dropped_e, alpha=settings.scale)
        if d_B_e is not None:
            d_B_e += transposed_times_narrow(d_y_e, inner_e)
    return d_inner, d_A, d_B


def _input_gradient(settings: _Settings, weights: Tensor, A: Tensor, d_inner: Tensor, d_y: Tensor) -> Tensor:
    """Gradient of ``x``, ``(rows, in)``."""
    d_x = settings.product(d_y.contiguous(), weights)
    updates = uninitialised(d_x, d_x.shape) if settings.dropout else d_x
    for updates_e, d_inner_e, A_e in _by_expert(settings.counts, (updates, d_inner), (A * settings.scale,)):
        torch.addmm(updates_e, d_inner_e, A_e, beta=0 if settings.dropout else 1, out=updates_e)
    return d_x.add_(settings.drop(updates)) if settings.dropout else d_x


def _by_expert(
    counts: list[int], rows: Sequence[Tensor], factors: Sequence[Tensor | None]
) -> Iterator[tuple[Any, ...]]:
    """The rows and factors of each expert that has rows.

    Args:
        counts: Rows of each expert.
        rows: Tensors ``(rows, *)``, sorted by expert; rows that belong to no expert come last.
        factors: Tensors ``(E, *)``, or ``(1, *)`` where all experts share one; None for each expert where None.
    """
    used = sum(counts)
    by_expert: list[Sequence[Any]] = [tensor[:used].split(counts) for tensor in rows]
    for factor in factors:
        if factor is None or len(factor) == 1:
            by_expert.append([None if factor is None else factor[0]] * len(counts))
        else:
            by_expert.append(factor.unbind())
    return (items for items in zip(*by_expert, strict=True) if len(items[0]))
