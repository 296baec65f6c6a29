"""Products of experts on rows that are sorted by expert.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``r`` rank, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.expert_rows import ends_for, missing_rank


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


def grouped_update(
    x: Tensor, A: Tensor, B: Tensor, scale: float, ends: Tensor, grouped_mm: Callable[..., Tensor], dropout: float = 0.0
) -> Tensor:
    r"""What `expert_update` computes, for all experts at once.

    Args:
        ends: ``(E,)`` int32: the end of each expert's rows.
        grouped_mm: The function by which the base multiplies rows sorted by expert, of torch or of transformers.

    Returns:
        ``(rows, out)`` in the type of ``x``; undefined in rows of no expert.
    """
    if dropout:
        x = F.dropout(x, dropout)
    missing = missing_rank(A.shape[1], x.dtype)
    A, B = F.pad(A.to(x.dtype), (0, 0, 0, missing)), F.pad(B.to(x.dtype), (0, missing))
    inner = grouped_mm(x, A.mT, offs=ends_for(ends, len(A))) * scale
    return grouped_mm(inner, B.mT, offs=ends_for(ends, len(B)))
