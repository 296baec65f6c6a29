"""Products with one narrow side, of width ``r``, in the order that BLAS does them best.

On a CPU a matrix of fewer than 16 columns is read poorly when it stands on the right: at rank 8 the products below take
two to five times longer as they are usually written (``benchmarks/products.py``). On a GPU the usual order is kept.
"""

from __future__ import annotations

from torch import Tensor

# Columns below which MKL is slow; one full vector of float32 in AVX-512.
_NARROW = 16


def times_narrow(y: Tensor, B: Tensor) -> Tensor:
    """``y B``: ``(T, out)`` times ``(out, r)``."""
    return y @ laid_out(B)


def transposed_times_narrow(y: Tensor, inner: Tensor) -> Tensor:
    """``y^T inner``: ``(T, out)`` and ``(T, r)`` to ``(out, r)``."""
    return (inner.T @ y).T if _is_slow(inner) else y.T @ inner


def laid_out(B: Tensor) -> Tensor:
    """``B``, ``(*, out, r)``, as it is best read on the right of a product: perhaps column after column."""
    return B.mT.contiguous().mT if _is_slow(B) else B


def _is_slow(narrow: Tensor) -> bool:
    return 1 < narrow.shape[-1] < _NARROW and narrow.is_cpu
