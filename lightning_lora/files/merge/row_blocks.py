"""The update of a stored tensor, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError

# Elements of a block. With fewer the product of the factors is slow, and more do not fit a cache.
BLOCK = 2**18


@dataclass(frozen=True)
class StoredUpdate:
    """The update of a stored tensor, which consists of one or more matrices: ``scale * left @ right`` for each.

    Shape:
        - ``left``: ``(matrices, rows, rank)``, ``right``: ``(matrices, rank, columns)``. ``matrices`` is 1 if all
          matrices share the factor.
        - The stored tensor has ``matrices * rows * columns`` elements, in that order.
    """

    left: Tensor
    right: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(matrices, rows, columns)``."""
        return max(len(self.left), len(self.right)), self.left.shape[1], self.right.shape[2]

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[RowBlock]:
        """Blocks of whole rows in the order of the stored tensor, to be computed in ``dtype``."""
        num_matrices, _, num_columns = self.shape
        left, right = self.left.expand(num_matrices, -1, -1), self.right.expand(num_matrices, -1, -1)
        step = max(1, BLOCK // num_columns)
        for matrix in range(num_matrices):
            scaled = (right[matrix].double() * self.scale).to(dtype)
            for rows in left[matrix].split(step):
                yield RowBlock(rows, scaled)


@dataclass(frozen=True)
class RowBlock:
    """Some rows of an update, not yet computed.

    Shape:
        - ``left``: ``(rows, rank)``. ``right``: ``(rank, columns)``, scaled, in the type of the update.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return self.left.shape[0], self.right.shape[1]

    def compute(self, out: Tensor | None = None) -> Tensor:
        """The update, ``(rows, columns)``, in ``out`` if given."""
        return torch.mm(self.left.to(self.right.dtype), self.right, out=out)


def matrix_update(
    layer: str, A: Tensor, B: Tensor, scale: float, shape: tuple[int, ...], transposed: bool, kernel_transposed: bool
) -> StoredUpdate:
    """The update of a weight that is stored as the model has it.

    Args:
        layer: Name of the adapted weight, for errors.
        A: The first factor, ``(rank, in)``.
        B: The second factor, ``(out, rank)``.
        scale: Factor of the update, ``alpha / rank`` or ``alpha / sqrt(rank)``.
        shape: Shape of the stored tensor: ``(out, in)``, ``(in, out)``, or that of a kernel.
        transposed: Whether a matrix is stored ``(in, out)``. If False, this is still found where the shape tells it.
        kernel_transposed: Whether the first axis of a kernel is that of its inputs.

    Raises:
        AdapterFileError: If the update does not fit the shape.
    """
    num_in, num_out = A.shape[1], B.shape[0]
    if len(shape) > 2 and num_in * num_out == torch.Size(shape).numel():
        transposed = kernel_transposed
    else:
        transposed = transposed or shape != (num_out, num_in)
        if shape != ((num_in, num_out) if transposed else (num_out, num_in)):
            found = (num_in, num_out) if transposed else (num_out, num_in)
            raise AdapterFileError(f"{layer}: the update is {found}, the weight {shape}.")
    left, right = (A.T, B.T) if transposed else (B, A)
    return StoredUpdate(left[None], right[None], scale)
