r"""The product of each expert and its low-rank update as one differentiable function, on rows sorted by expert.

No expert's ``B A`` is formed, nothing is concatenated: every expert writes its rows of the output, the small product
first and the large one added to it, forward and backward.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.functional.experts import expert_linear, expert_update
from lightning_lora.functional.narrow import times_narrow, transposed_times_narrow
from lightning_lora.functional.origin import Origin, origin, remade, source_gradients
from lightning_lora.functional.second_order import gradients_of
from lightning_lora.functional.seeded_dropout import drop, kept_share, shared_seed


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
        dropped, scaled = drop(x, settings.dropout, settings.seed), A * settings.scale
        inner, y = x.new_empty(len(x), A.shape[1]), x.new_empty(len(x), B.shape[1])
        for expert, run in _runs(settings.counts):
            out = y[run]
            torch.mm(dropped[run], _of(scaled, expert).T, out=inner[run])
            if bias is None:
                torch.mm(inner[run], _of(B, expert).T, out=out)
            else:
                torch.addmm(bias[expert], inner[run], _of(B, expert).T, out=out)
            torch.addmm(out, x[run], weights[expert].T, out=out)
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
        d_inner = torch.empty_like(inner)
        d_A, d_B = (torch.zeros_like(factor) if needs else None for factor, needs in ((A, needs_A), (B, needs_B)))
        for expert, run in _runs(settings.counts):
            d_inner[run] = times_narrow(d_y[run], _of(B, expert))
            if d_A is not None:
                _of(d_A, expert).addmm_(d_inner[run].T, dropped[run], alpha=settings.scale)
            if d_B is not None:
                _of(d_B, expert).add_(transposed_times_narrow(d_y[run], inner[run]))
        if not any(needs_sources):
            return None, None, None, None, d_A, d_B, *[None] * len(sources)
        d_x, scaled = torch.empty_like(x), A * settings.scale
        for expert, run in _runs(settings.counts):
            torch.mm(d_inner[run], _of(scaled, expert), out=d_x[run])
        d_x = drop(d_x, settings.dropout, settings.seed)
        for expert, run in _runs(settings.counts):
            torch.addmm(d_x[run], d_y[run], weights[expert], out=d_x[run])
        return None, None, None, None, d_A, d_B, *source_gradients(settings.origin, sources, d_x, activated)


def _runs(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _of(factors: Tensor, expert: int) -> Tensor:
    """An expert's factor, or the one that all share."""
    return factors[expert if factors.shape[0] > 1 else 0]
