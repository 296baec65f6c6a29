"""The LoRA update as tensor arithmetic: no modules, no state.

Shape legend: ``*`` any leading axes, ``r`` rank, ``in``/``out`` features, ``vocab`` rows of an embedding table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_update(x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    r"""``scale * drop(x) A^T B^T``, what LoRA adds to the output of a linear layer.

    The factors are cast to the type of ``x`` (a few thousand numbers), not ``x`` to theirs (the activations): float32
    factors on a bfloat16 base act as master weights, and no wide copy of the activations is kept.

    Args:
        x: ``(*, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: alpha / r, dimensionless.
        dropout: Probability of zeroing an entry of ``x``; 0 outside training.

    Returns:
        ``(*, out)`` in the type of ``x``, or of the autocast region.

    References:
        Hu et al., *LoRA*, ICLR 2022, section 4.1.
    """
    if dropout:
        x = F.dropout(x, dropout)
    # The scale multiplies the product of width r, the smallest of the three tensors.
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def embedding_update(rows: Tensor, A: Tensor, B: Tensor, scale: float, padding_idx: int | None = None) -> Tensor:
    r"""``scale * (B A)^T[rows]``, what LoRA adds to the rows looked up in an embedding table.

    Args:
        rows: Integer indices ``(*)``.
        A: ``(r, vocab)``.
        B: ``(dim, r)``.
        scale: alpha / r, dimensionless.
        padding_idx: The row that learns nothing, as in ``nn.Embedding``; None: every row learns.

    Returns:
        ``(*, dim)`` in the type of the factors.
    """
    return F.linear(F.embedding(rows, A.T, padding_idx) * scale, B)


def weight_update(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``scale * B A`` in at least float32, ``(out, in)``: what merging adds to the base weight."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    return (B.to(dtype) @ A.to(dtype)) * scale


def merged_weight(weight: Tensor, update: Tensor) -> Tensor:
    """``weight + update``, summed in at least float32 and rounded once to the type of ``weight``."""
    dtype = torch.promote_types(weight.dtype, update.dtype)
    return (weight.to(dtype) + update.to(dtype)).to(weight.dtype)


def rounding_loss(weight: Tensor, merged: Tensor, update: Tensor) -> float:
    """Share of an update that rounding to the type of ``merged`` lost: ``|stored change - update| / |update|``.

    0 for an update of zero. Small updates of bfloat16 weights can vanish: an entry changes only if its update exceeds
    half a step, about 2^-9 of the entry.
    """
    norm = update.norm()
    lost = ((merged.to(update.dtype) - weight.to(update.dtype)) - update).norm()
    return float(lost / norm) if norm else 0.0
