r"""Per-example gradients of linear layers, from the input of a layer and the gradient of its output.

The weight itself is not needed, so the formulas hold for quantised and sharded weights too.

Shape legend: ``n`` rows, ``t`` positions (tokens) of a row, ``r`` rank, ``k`` side of a sketch.

References:
    Goodfellow, *Efficient Per-Example Gradient Computations*, 2015, https://arxiv.org/abs/1510.01799
    Gray et al., *Normalization Layer Per-Example Gradients...*, 2024, https://arxiv.org/abs/2411.00999
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adapter_row_gradients(x: Tensor, d_y: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of both factors of ``y += scale * x A^T B^T`` for each row.

    ``d_A = scale * (d_y B)^T x`` and ``d_B = scale * d_y^T (x A^T)``, summed over the positions of a row.

    Args:
        x: ``(n, t, in)``, the input of the update, after dropout.
        d_y: ``(n, t, out)``, gradient of the *sum* of the losses of the rows.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: Factor of the update, such as alpha over rank.

    Returns:
        ``d_A`` ``(n, r, in)`` and ``d_B`` ``(n, out, r)``.
    """
    # Batched products of few operators: `einsum` and `@` launch several views and copies each.
    n = len(x)
    inner = torch.bmm(d_y, B.expand(n, *B.shape)), torch.bmm(x, A.mT.expand(n, A.shape[1], A.shape[0]))
    d_A = torch.baddbmm(A, inner[0].mT, x, beta=0, alpha=scale)
    d_B = torch.baddbmm(B, d_y.mT, inner[1], beta=0, alpha=scale)
    return d_A, d_B


def weight_row_sketches(x: Tensor, d_y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sketches ``left G_i right`` of the gradient ``G_i = d_y^T x`` of a frozen weight, for each row.

    ``G_i`` is never formed. With matrices from `sketch_matrix`, inner products between rows, and so square norms, are
    kept in expectation.

    Args:
        x: ``(n, t, in)``, the input of the layer.
        d_y: ``(n, t, out)``, gradient of the sum of the losses of the rows.
        left: ``(k, out)``.
        right: ``(in, k)``.

    Returns:
        ``(n, k, k)``.
    """
    return torch.einsum("ntk,ntl->nkl", d_y @ left.T, x @ right)


def sketch_matrix(side: int, length: int, generator: torch.Generator) -> Tensor:
    """A random matrix ``R`` with normal entries of variance ``1 / side``, so that ``E |R v|^2 = |v|^2``.

    The identity for a dimension that is not longer than ``side``.

    Args:
        side: ``k``; the relative error of a square norm falls as ``1 / k``.
        length: ``out`` or ``in``.
        generator: Source of the random numbers, apart from that of training; its device is that of the result.
    """
    # Not the default type, which 'true' precisions lower within a training step.
    options: Any = {"device": generator.device, "dtype": torch.float32}
    if length <= side:
        return torch.eye(length, **options)
    return torch.randn(side, length, generator=generator, **options) / side**0.5
