"""Rows sorted by expert, and the products of experts with their rows: all experts at once, or one after the other.

Torch's grouped product (`torch.nn.functional.grouped_mm`) reads on the device where each expert's rows end, so nothing
waits for it, and its cost to launch does not grow with the number of experts. Its source (2.10 to 2.13,
``native/GroupedMMUtils.h`` and ``native/cuda/GroupedBlas.cpp``) takes float32, bfloat16 and float16, with strides of
multiples of 16 bytes. It has a kernel of its own for bfloat16 on CUDA devices of capability 9 and 10; elsewhere torch
loops over experts itself, and on CUDA waits for the ends, as the base does where it multiplies so.

Shape legend: ``rows`` pairs of a token and an expert, ``E`` experts, ``G`` matrices (``E``, or 1 that all share),
``in``/``out`` features of a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.torch_internals import uninitialised

_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16
# Rows per expert, on average, up to which grouped products are the faster on a CPU (benchmarks/expert_products.py).
_FEW_ROWS = 128


class ExpertRows(Protocol):
    """Which rows belong to which expert, and the products of each expert with its rows.

    A single matrix is shared by all experts. Rows beyond the last expert's belong to none: what a product holds there
    is undefined, and never reaches other rows.
    """

    @property
    def counts(self) -> list[int]:
        """Rows of each expert; where they are on a device, reading them waits for it."""
        ...

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``x_e M_e``: ``(rows, in)`` times ``(G, in, out)``."""
        ...

    def add_times(self, y: Tensor, x: Tensor, matrices: Tensor, scale: float) -> None:
        """Add ``scale * x_e M_e`` to ``y``, ``(rows, out)``."""
        ...

    def between(self, x: Tensor, y: Tensor, num_matrices: int) -> Tensor:
        """``x_e^T y_e``: ``(rows, in)`` and ``(rows, out)`` to ``(G, in, out)``; zeros for experts without rows."""
        ...

    def padded_rank(self, rank: int, dtype: torch.dtype) -> int:
        """The rank that factors are padded to for these products, with zeros."""
        return rank


class GroupedRows(ExpertRows):
    """Products of all experts at once.

    Args:
        ends: ``(E,)`` int32: the end of each expert's rows, on the device of the rows.
    """

    def __init__(self, ends: Tensor) -> None:
        self._ends = ends

    @property
    def counts(self) -> list[int]:
        """Rows of each expert; reading them waits for the device."""
        return counts_of(self._ends)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``x_e M_e`` in one grouped product."""
        return F.grouped_mm(x, matrices, offs=ends_for(self._ends, len(matrices)))

    def add_times(self, y: Tensor, x: Tensor, matrices: Tensor, scale: float) -> None:
        """Add ``scale * x_e M_e``, computed first, to ``y``."""
        y.add_(self.times(x, matrices), alpha=scale)

    def between(self, x: Tensor, y: Tensor, num_matrices: int) -> Tensor:
        """``x_e^T y_e`` in one grouped product."""
        return F.grouped_mm(x.mT, y, offs=ends_for(self._ends, num_matrices))

    def padded_rank(self, rank: int, dtype: torch.dtype) -> int:
        """The next rank whose rows of numbers have a stride that grouped products take."""
        return rank + missing_rank(rank, dtype)


class LoopedRows(ExpertRows):
    """Products of one expert after the other; the small product is added to the large one as it is computed.

    Args:
        counts: Rows of each expert.
    """

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return self._counts

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``x_e M_e``, one product for each expert that has rows."""
        product = uninitialised(x, (len(x), matrices.shape[-1]))
        for x_e, product_e, matrix in self._by_expert((x, product), matrices):
            torch.mm(x_e, matrix, out=product_e)
        return product

    def add_times(self, y: Tensor, x: Tensor, matrices: Tensor, scale: float) -> None:
        """Add ``scale * x_e M_e`` to ``y`` as it is computed."""
        for x_e, y_e, matrix in self._by_expert((x, y), matrices):
            y_e.addmm_(x_e, matrix, alpha=scale)

    def between(self, x: Tensor, y: Tensor, num_matrices: int) -> Tensor:
        """``x_e^T y_e``, one product for each expert that has rows."""
        products = x.new_zeros(num_matrices, x.shape[1], y.shape[1])
        for x_e, y_e, product in self._by_expert((x, y), products):
            torch.mm(x_e.T, y_e, out=product)
        return products

    def _by_expert(self, rows: Sequence[Tensor], matrices: Tensor) -> Iterator[tuple[Any, ...]]:
        """The rows of each expert that has some, and its matrix; all rows where one matrix is shared."""
        used = sum(self._counts)
        counts = self._counts if len(matrices) == len(self._counts) else [used]
        by_expert = [tensor[:used].split(counts) for tensor in rows]
        return (items for items in zip(*by_expert, matrices.unbind(), strict=True) if len(items[0]))


def rows_by_expert(x: Tensor, weights: Tensor, ends: Tensor) -> ExpertRows:
    """Rows for the products of a pass, forward and backward, in the way that is fastest for these tensors.

    Args:
        x: ``(rows, in)``, sorted by expert.
        weights: ``(E, out, in)``, frozen.
        ends: ``(E,)`` int32: the end of each expert's rows.
    """
    return GroupedRows(ends) if can_group(x, weights) and grouping_pays(x, weights) else LoopedRows(counts_of(ends))


def can_group(x: Tensor, weights: Tensor) -> bool:
    """Whether all products of a pass, forward and backward, can be grouped.

    Args:
        x: ``(rows, in)``.
        weights: ``(E, out, in)``.
    """
    unit = _STRIDE_BYTES // x.element_size()
    return len(x) > 0 and can_multiply(x, weights) and all(side % unit == 0 for side in weights.shape[1:])


def can_multiply(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped product takes these tensors; the unadapted base fails on others, and we need not."""
    return x.dtype in _GROUPED_TYPES and _has_layout(x) and _has_layout(matrices)


def _has_layout(matrix: Tensor) -> bool:
    """Whether one of the last two axes is contiguous, and the other has a stride that grouped products take."""
    unit = _STRIDE_BYTES // matrix.element_size()
    (first, second), (num_rows, num_columns) = matrix.stride()[-2:], matrix.shape[-2:]
    by_row = second == 1 and first >= num_columns and first % unit == 0
    return by_row or (first == 1 and second >= num_rows and second % unit == 0)


def grouping_pays(x: Tensor, weights: Tensor) -> bool:
    """Whether grouped products cost less than a loop over experts: on a GPU, and on a CPU where experts have few rows.

    On a CPU both loop over experts, torch in fewer steps; but it cannot add a product to a tensor as it is computed.
    """
    return not x.is_cpu or len(x) <= _FEW_ROWS * len(weights)


def ends_for(ends: Tensor, num_matrices: int) -> Tensor:
    """Where the rows of each matrix end; a matrix that all experts share has all rows."""
    return ends if num_matrices == len(ends) else ends[-1:]


def counts_of(ends: Tensor) -> list[int]:
    """Rows of each expert, read from where they end; it waits for the device of ``ends``."""
    listed = ends.tolist()
    return [end - start for start, end in zip([0, *listed], listed, strict=False)]


def missing_rank(rank: int, dtype: torch.dtype) -> int:
    """What a rank lacks to a stride that grouped products take."""
    return -rank % (_STRIDE_BYTES // dtype.itemsize)
