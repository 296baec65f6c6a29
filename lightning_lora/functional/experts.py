"""Products of a mixture of experts, on rows sorted by expert.

Shape legend: ``T`` tokens, ``k`` active experts a token, ``rows`` pairs of a token and an expert, at most ``T * k``,
``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Pairs of token and expert, sorted by expert.

    Args:
        order: ``(rows,)``: position of each pair in the flattened ``(T, k)`` table of experts; ``order // k`` is its
            token.
        counts: Rows of each expert, ``E`` numbers.
    """

    order: Tensor
    counts: list[int]


def sort_by_expert(experts: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of a routing table by expert.

    Args:
        experts: ``(T, k)`` expert of each pair; ``num_experts`` and above means none (expert parallelism).
        num_experts: ``E``.
    """
    flat = experts.reshape(-1)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1).tolist()[:num_experts]
    return Routing(flat.argsort(stable=True)[: sum(counts)], counts)


def expert_linear(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Each run of rows times the matrix of its expert, ``x_e W_e^T``.

    Args:
        x: ``(rows, in)``, sorted by expert.
        weights: ``(E, out, in)``, or ``(1, out, in)`` for one matrix that all experts share.
        counts: Rows of each expert.

    Returns:
        ``(rows, out)``.
    """
    if weights.shape[0] == 1:
        return F.linear(x, weights[0])
    runs = zip(x.split(counts), weights.unbind(0), strict=True)
    products = [F.linear(run, weight) for run, weight in runs if run.shape[0]]
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


def combine(y: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """The weighted sum over the experts of each token.

    Args:
        y: ``(rows, out)``, sorted by expert.
        routing: How the rows were sorted.
        weights: ``(T, k)`` routing weights.

    Returns:
        ``(T, out)`` in the type that ``y`` times ``weights`` has.
    """
    weighted = y * weights.reshape(-1, 1)[routing.order]
    # One place for each pair: unlike adding into tokens, the same result whatever the order of threads.
    pairs = weighted.new_zeros(weights.numel(), y.shape[-1]).index_copy(0, routing.order, weighted)
    return pairs.view(*weights.shape, -1).sum(dim=1)
