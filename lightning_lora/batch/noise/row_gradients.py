r"""Gradients of single rows, from what a layer is given and the gradient of what it returns.

Nothing here needs the weight, so quantised and sharded ones are no obstacle.

Shape legend: ``n`` rows, ``t`` positions of each (tokens), ``r`` rank, ``k`` side of a sketch.

References:
    Goodfellow, *Efficient Per-Example Gradient Computations*, 2015, https://arxiv.org/abs/1510.01799
    Gray et al., *Normalization Layer Per-Example Gradients...*, 2024, https://arxiv.org/abs/2411.00999
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapter_row_gradients(x: Tensor, d_y: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of both factors of ``y += scale * x A^T B^T``, for each row alone.

    ``d_A = scale * (d_y B)^T x`` and ``d_B = scale * d_y^T (x A^T)``, summed over the positions of a row.

    Args:
        x: ``(n, t, in)``, what the update was computed from (after dropout).
        d_y: ``(n, t, out)``, gradient of the *sum* of the losses of the rows.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: Alpha over rank.

    Returns:
        ``(n, r, in)`` and ``(n, out, r)``.
    """
    d_A = torch.einsum("ntr,nti->nri", d_y @ B, x)
    d_B = torch.einsum("nto,ntr->nor", d_y, x @ A.T)
    return scale * d_A, scale * d_B


def weight_row_sketches(x: Tensor, d_y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left G_i right`` of the gradient ``G_i = d_y^T x`` of a frozen weight, for each row, without ever holding it.

    With matrices of `sketch_matrix` inner products between rows, and so square norms, are kept in expectation.

    Args:
        x: ``(n, t, in)``.
        d_y: ``(n, t, out)``, gradient of the sum of the losses of the rows.
        left: ``(k, out)``.
        right: ``(in, k)``.

    Returns:
        ``(n, k, k)``.
    """
    return torch.einsum("ntk,ntl->nkl", d_y @ left.T, x @ right)


def sketch_matrix(num_rows: int, num_columns: int, side: int, generator: torch.Generator) -> Tensor:
    """Normal entries of variance ``1 / side``, on the device of ``generator``: ``E |R v|^2 = |v|^2``.

    Args:
        num_rows: ``side`` of a left matrix, ``in`` of a right one.
        num_columns: ``out`` of a left matrix, ``side`` of a right one.
        side: ``k``; the error of a square norm falls as ``1 / k``.
        generator: Of the random numbers, so that training's are left alone.
    """
    entries = torch.randn(num_rows, num_columns, generator=generator, device=generator.device)
    return entries / side**0.5
