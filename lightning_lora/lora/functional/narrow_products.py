"""Products with a narrow side, of width ``r``, in the order that BLAS computes fastest.

On a CPU, a matrix of fewer than 16 columns is slow to read on the right of a product: at rank 8 the products below take
two to five times longer in their usual order (``benchmarks/products.py``). On a GPU the usual order is kept.
"""

from __future__ import annotations

from torch import Tensor

from lightning_lora.lora.functional.kernels import chosen
from lightning_lora.lora.functional.torch_internals import uninitialised

# Columns below which MKL is slow; one full vector of float32 in AVX-512.
_NARROW = 16
# What a program of the kernel holds in registers grows with the rank.
_MAX_KERNEL_RANK = 128


def times_narrow(y: Tensor, B: Tensor) -> Tensor:
    """``y B``: ``(T, out)`` times ``(out, r)``."""
    return y @ fast_layout(B)


def transposed_times_narrow(y: Tensor, inner: Tensor) -> Tensor:
    """``y^T inner``: ``(T, out)`` and ``(T, r)`` to ``(out, r)``."""
    return (inner.T @ y).T if _is_slow(inner) else y.T @ inner


def narrow_gradients(y: Tensor, B: Tensor, inner: Tensor | None, needs_both: bool) -> tuple[Tensor, Tensor | None]:
    """``y B`` and, where a kernel computes both from one read of ``y``, ``y^T inner`` in the type of ``B``; else None.

    Args:
        y: ``(T, out)``.
        B: ``(out, r)``.
        inner: ``(T, r)``; None if it is not known.
        needs_both: Whether the second product is needed at all.
    """
    out, rank = B.shape
    if inner is None or not needs_both or rank > _MAX_KERNEL_RANK:
        return times_narrow(y, B), None
    if not chosen("narrow", narrow_shape(out, rank), len(y), y, B, inner):
        return times_narrow(y, B), None
    from lightning_lora.lora.functional.kernels.narrow import both_narrow

    d_inner = uninitialised(y, inner.shape)
    return d_inner, both_narrow(d_inner, y, B, inner, 1.0).to(B.dtype)


def narrow_shape(out: int, rank: int) -> str:
    """How the table of kernels calls the two products."""
    return f"{out} {rank}"


def fast_layout(B: Tensor) -> Tensor:
    """``B``, ``(*, out, r)``, in the layout that is fastest on the right of a product: column by column if narrow."""
    return B.mT.contiguous().mT if _is_slow(B) else B


def _is_slow(narrow: Tensor) -> bool:
    return 1 < narrow.shape[-1] < _NARROW and narrow.is_cpu
