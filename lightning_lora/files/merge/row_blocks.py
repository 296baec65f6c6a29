"""The update of a stored tensor, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFolderError

# Elements of a block. With fewer the product of the factors is slow, and more do not fit a cache.
BLOCK = 2**18


@dataclass(frozen=True)
class StoredUpdate:
    """The update of a stored tensor, which consists of one or more matrices: ``scale * left @ right`` for each.

    With a magnitude (DoRA) the rows or columns of the sum ``W + scale * left @ right`` are multiplied by a ratio too,
    which `with_ratio` computes.

    Shape:
        - ``left``: ``(matrices, rows, rank)``, ``right``: ``(matrices, rank, columns)``. ``matrices`` is 1 if all
          matrices share the factor.
        - The stored tensor has ``matrices * rows * columns`` elements, in that order.
        - ``magnitude``: ``(rows, 1)`` or ``(1, columns)``, or None; ``ratio`` likewise.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None
    ratio: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(matrices, rows, columns)``."""
        return max(len(self.left), len(self.right)), self.left.shape[1], self.right.shape[2]

    def with_ratio(self, read: Callable[[int, int], Tensor]) -> StoredUpdate:
        """The update with the ratio of the magnitude to the norm of each row or column of the sum.

        Args:
            read: Reads elements of the weight, from a first to before a last one. All are read once.
        """
        if self.magnitude is None:
            return self
        axis = 1 if self.magnitude.shape[1] == 1 else 0
        squares, start = [], 0
        for block in self.blocks(torch.float64):
            stop = start + torch.Size(block.shape).numel()
            total = block.compute().add_(read(start, stop).view(block.shape))
            squares.append(total.square_().sum(axis, keepdim=True))
            start = stop
        norms = (torch.cat(squares) if axis else torch.stack(squares).sum(0)).sqrt()
        return replace(self, ratio=torch.where(norms == 0, 1.0, self.magnitude.double() / norms))

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[RowBlock]:
        """Blocks of whole rows in the order of the stored tensor, to be computed in ``dtype``."""
        num_matrices, _, num_columns = self.shape
        left, right = self.left.expand(num_matrices, -1, -1), self.right.expand(num_matrices, -1, -1)
        step = max(1, BLOCK // num_columns)
        for matrix in range(num_matrices):
            scaled = (right[matrix].double() * self.scale).to(dtype)
            for start in range(0, len(left[matrix]), step):
                rows = slice(start, start + step)
                ratio = self.ratio if self.ratio is None or len(self.ratio) == 1 else self.ratio[rows]
                yield RowBlock(left[matrix, rows], scaled, ratio)


@dataclass(frozen=True)
class RowBlock:
    """Some rows of an update, not yet computed.

    Shape:
        - ``left``: ``(rows, rank)``. ``right``: ``(rank, columns)``, scaled, in the type of the update.
        - ``ratio``: ``(rows, 1)`` or ``(1, columns)``, or None.
    """

    left: Tensor
    right: Tensor
    ratio: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return self.left.shape[0], self.right.shape[1]

    def compute(self, out: Tensor | None = None) -> Tensor:
        """The update, ``(rows, columns)``, in ``out`` if given."""
        return torch.mm(self.left.to(self.right.dtype), self.right, out=out)

    def change(self, weight: Tensor, out: Tensor) -> Tensor:
        """What the update adds to these rows of the weight, ``(rows, columns)``, in ``out``."""
        update = self.compute(out)
        if self.ratio is None:
            return update
        ratio = self.ratio.to(update.dtype)
        return update.mul_(ratio).addcmul_(weight, ratio - 1)


def matrix_update(
    layer: str,
    A: Tensor,
    B: Tensor,
    scale: float,
    shape: tuple[int, ...],
    transposed: bool,
    kernel_transposed: bool,
    magnitude: Tensor | None = None,
) -> StoredUpdate:
    """The update of a weight that is stored as the model has it.

    Args:
        A: The first factor, ``(rank, in)``.
        B: The second factor, ``(out, rank)``.
        scale: Factor of the update, ``alpha / rank`` or ``alpha / sqrt(rank)``.
        shape: Shape of the stored tensor: ``(out, in)``, ``(in, out)``, or that of a kernel.
        transposed: Whether a matrix is stored ``(in, out)``. If False, this is still found where the shape tells it.
        kernel_transposed: Whether the first axis of a kernel is that of its inputs.
        magnitude: The magnitudes of the output features, ``(out,)``, if any.

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
            raise AdapterFolderError(f"{layer}: the update is {found}, the weight {shape}.")
    left, right = (A.T, B.T) if transposed else (B, A)
    if magnitude is not None:
        magnitude = magnitude[None] if transposed else magnitude[:, None]
    return StoredUpdate(left[None], right[None], scale, magnitude)
