"""Products with a narrow side, of width ``r``, in the order that BLAS computes fastest.

On a CPU, a matrix of fewer than 16 columns is slow to read on the right of a product: at rank 8 the products below take
two to five times longer in their usual order (``benchmarks/products.py``). On a GPU the usual order is kept.
"""

from __future__ import annotations

from torch import Tensor

# Columns below which MKL is slow; one full vector of float32 in AVX-512.
_NARROW = 16


def times_narrow(y: Tensor, B: Tensor) -> Tensor:
    """``y B``: ``(T, out)`` times ``(out, r)``."""
    return y @ fast_layout(B)


def transposed_times_narrow(y: Tensor, inner: Tensor) -> Tensor:
    """``y^T inner``: ``(T, out)`` and ``(T, r)`` to ``(out, r)``."""
    return (inner.T @ y).T if is_slow(inner) else y.T @ inner


def fast_layout(B: Tensor) -> Tensor:
    """``B``, ``(*, out, r)``, in the layout that is fastest on the right of a product: column by column if narrow."""
    return B.mT.contiguous().mT if is_slow(B) else B


def is_slow(narrow: Tensor) -> bool:
    """Whether products with ``narrow``, ``(*, r)``, on the right are slow in their usual order."""
    return 1 < narrow.shape[-1] < _NARROW and narrow.is_cpu
