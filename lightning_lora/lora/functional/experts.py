"""Sorting tokens by expert and back, and products of experts on rows so sorted.

Shape legend: ``T`` tokens, ``k`` active experts of a token, ``rows`` pairs of a token and an expert, at most ``T * k``,
``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Pairs of a token and an expert, sorted by expert.

    Args:
        order: ``(rows,)``, position of each pair in the flattened ``(T, k)`` table of experts.
        token: ``(rows,)``, token of each pair.
        row: ``(T, k)``, row of each pair; ``rows``, one past the last, for a pair without an expert.
        counts: Rows of each expert, ``E`` numbers.
    """

    order: Tensor
    token: Tensor
    row: Tensor
    counts: list[int]


def sort_by_expert(experts: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of a routing table by expert.

    Args:
        experts: ``(T, k)``, expert of each pair; ``num_experts`` and above means none (expert parallelism).
        num_experts: ``E``.
    """
    flat = experts.reshape(-1)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1).tolist()[:num_experts]
    order = flat.argsort(stable=True)[: sum(counts)]
    rows = torch.arange(len(order), device=order.device)
    row = torch.full_like(flat, len(order), dtype=order.dtype).index_copy(0, order, rows)
    return Routing(order, order // experts.shape[-1], row.view_as(experts), counts)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """The token of each pair: ``(T, in)`` to ``(rows, in)``."""
    return _Dispatch.apply(x, routing.token, routing.row)


def expert_linear(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Rows of each expert times the matrix of the expert, ``x_e W_e^T``.

    Args:
        x: ``(rows, in)``, sorted by expert.
        weights: ``(E, out, in)``, or ``(1, out, in)`` for one matrix that all experts share.
        counts: Rows of each expert.

    Returns:
        ``(rows, out)``.
    """
    if weights.shape[0] == 1:
        return F.linear(x, weights[0])
    by_expert = zip(x.split(counts), weights.unbind(0), strict=True)
    products = [F.linear(rows, weight) for rows, weight in by_expert if rows.shape[0]]
    return torch.cat(products) if products else F.linear(x, weights[0])


def expert_update(x: Tensor, A: Tensor, B: Tensor, scale: float, counts: list[int], dropout: float = 0.0) -> Tensor:
    r"""``scale * drop(x_e) A_e^T B_e^T``: what LoRA adds to the product of each expert; no expert's ``B A`` is formed.

    Args:
        x: ``(rows, in)``, sorted by expert.
        A: ``(E, r, in)``, or ``(1, r, in)`` shared by all experts.
        B: ``(E, out, r)``, or ``(1, out, r)``.
        scale: alpha / r, dimensionless.
        counts: Rows of each expert.
        dropout: Probability of zeroing an entry of ``x``; 0 outside training.

    Returns:
        ``(rows, out)`` in the type of ``x``, or of the autocast region.
    """
    if dropout:
        x = F.dropout(x, dropout)
    return expert_linear(expert_linear(x, A.to(x.dtype), counts) * scale, B.to(x.dtype), counts)


def combine_experts(y: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """The weighted sum over the experts of each token.

    Args:
        y: ``(rows, out)``, sorted by expert.
        routing: How the rows were sorted.
        weights: ``(T, k)``, routing weights.

    Returns:
        ``(T, out)`` in the type of ``y`` times ``weights``.
    """
    return _CombineExperts.apply(y, weights, *routing[:3])


def _rows_of_tokens(rows: Tensor, row: Tensor) -> Tensor:
    """``(rows, *)`` to ``(T, k, *)``, zero for pairs without an expert.

    Every token fetches its rows, forward and backward: several times faster than adding rows to tokens, and the same
    result whatever the order of threads.
    """
    if len(rows) < row.numel():
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return rows.index_select(0, row.flatten()).view(*row.shape, *rows.shape[1:])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> Any:
        (row,) = ctx.saved_tensors
        return _rows_of_tokens(d_rows[0], row).sum(1), None, None


class _CombineExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, token, row)
        return (_rows_of_tokens(y, row) * weights[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *d_tokens: Tensor) -> Any:
        y, weights, order, token, row = ctx.saved_tensors
        d_rows = d_tokens[0].index_select(0, token)
        d_weights = _rows_of_tokens((d_rows * y).sum(-1), row).to(weights.dtype)
        return (d_rows * weights.flatten()[order, None]).to(y.dtype), d_weights, None, None, None
