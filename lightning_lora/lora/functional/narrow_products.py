"""Products with a narrow side, of width ``r``, in the order that BLAS computes fastest.

On a CPU, a matrix of fewer than 16 columns is slow to read on the right of a product: at rank 8 the products below take
two to five times longer in their usual order (``benchmarks/products.py``). On a GPU the usual order is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.lora.functional.kernels import chosen
from lightning_lora.lora.functional.torch_internals import uninitialised

# Columns below which MKL is slow; one full vector of float32 in AVX-512.
_NARROW = 16
# What a program of the kernel holds in registers grows with the rank.
_MAX_KERNEL_RANK = 128


def scaled_product(out: Tensor, x: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """Write ``scale * x matrix`` to ``out``, ``(T, n)``, in one launch; return ``out``."""
    return torch.addmm(out, x, matrix, beta=0, alpha=scale, out=out)


def transposed_times_narrow(y: Tensor, inner: Tensor) -> Tensor:
    """``y^T inner``: ``(T, out)`` and ``(T, r)`` to ``(out, r)``."""
    return (inner.T @ y).T if is_slow(inner) else y.T @ inner


def transposed_products(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """``left^T right`` of each pair, ``(T, n)`` and ``(T, m)`` to ``(n, m)``, in ``dtype``.

    Where that is wider than the pairs, a GPU writes the sums as it has them, in float32; elsewhere the results are cast
    together.
    """
    like = pairs[0][0]
    if like.dtype == dtype:
        return [transposed_times_narrow(left, right) for left, right in pairs]
    if like.is_cuda and like.element_size() < 4 and dtype is torch.float32:
        return [torch.mm(left.T, right, out_dtype=dtype) for left, right in pairs]
    sizes = [left.shape[1] * right.shape[1] for left, right in pairs]
    memory = uninitialised(like, (sum(sizes),))
    for part, (left, right) in zip(memory.split(sizes), pairs, strict=True):
        torch.mm(left.T, right, out=part.view(left.shape[1], -1))
    parts = memory.to(dtype).split(sizes)
    return [part.view(left.shape[1], -1) for part, (left, _) in zip(parts, pairs, strict=True)]


def narrow_gradients(out: Tensor, y: Tensor, B: Tensor, S: Tensor | None, scale: float) -> Tensor | None:
    """Write ``scale * y B`` to ``out``; return ``y^T S`` in float32 where a kernel computes both in one go, else None.

    Args:
        out: ``(T, r)``.
        y: ``(T, num_out)``.
        B: ``(num_out, r)``.
        S: ``(T, r)``; None if it is not known, or the second product not needed.
        scale: Factor of the first product.
    """
    num_out, rank = B.shape
    if S is not None and rank <= _MAX_KERNEL_RANK and chosen("narrow", narrow_shape(num_out, rank), len(y), y, B, S):
        from lightning_lora.lora.functional.kernels.narrow import both_narrow

        return both_narrow(out, y, B, S, scale)
    scaled_product(out, y, fast_layout(B), scale)
    return None


def narrow_shape(out: int, rank: int) -> str:
    """How the table of kernels calls the two products."""
    return f"{out} {rank}"


def fast_layout(B: Tensor) -> Tensor:
    """``B``, ``(*, out, r)``, in the layout that is fastest on the right of a product: column by column if narrow."""
    return B.mT.contiguous().mT if is_slow(B) else B


def is_slow(narrow: Tensor) -> bool:
    """Whether products with ``narrow``, ``(*, r)``, on the right are slow in their usual order."""
    return 1 < narrow.shape[-1] < _NARROW and narrow.is_cpu
