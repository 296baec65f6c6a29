"""Adding updates to weights and rounding the sums to the stored type, block by block, and what rounding takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFolderError
from lightning_lora.files.merge.row_blocks import RowBlock
from lightning_lora.files.scratch import Scratch


class BlockError(NamedTuple):
    """The rounding error of a block: its largest absolute value, and the squared norms of the error and the update."""

    largest: float
    lost: float
    update: float


def sum_dtype(read: torch.dtype, written: torch.dtype) -> torch.dtype:
    """The type to sum in: twice as wide as the type that is written, and no narrower than the type that is read.

    Errors are exact where it is float64. In float32 they are thousands of times finer than the rounding they measure.
    """
    return torch.promote_types(read, torch.float32 if written.itemsize == 2 else torch.float64)


def merged_block(
    name: str, weight: Tensor, update: RowBlock, dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, BlockError]:
    """Sum weight and update, and round once, to the type that is stored.

    Args:
        weight: A block of the base weight, ``(rows, columns)``.
        scratch: Memory of the result and of intermediate values.

    Raises:
        AdapterFileError: If a finite value is too large for ``dtype``.
    """
    shape, wide = update.shape, update.right.dtype
    exact = scratch.empty("weight", shape, wide).copy_(weight)
    change = update.change(exact, out=scratch.empty("update", shape, wide))
    total = torch.add(exact, change, out=scratch.empty("sum", shape, wide))
    merged = scratch.empty("written", shape, dtype).copy_(total)
    error = _block_error(exact, change, total.copy_(merged))
    if not math.isfinite(error.largest):
        _check_fits(name, weight.to(wide) + change, merged)
    return merged, error


def rounded_block(name: str, block: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Round a block to the type that is stored.

    Raises:
        AdapterFileError: If a finite value is too large for ``dtype``.
    """
    if block.dtype == dtype:
        return block
    stored = scratch.empty("written", tuple(block.shape), dtype).copy_(block)
    if torch.promote_types(block.dtype, dtype) != dtype:
        limit = torch.finfo(dtype).max
        low, high = block.aminmax()
        if not (-limit <= float(low) and float(high) <= limit):
            _check_fits(name, block, stored)
    return stored


def tensor_error(blocks: Sequence[BlockError]) -> tuple[float, float]:
    """The error of a tensor from those of its blocks: its largest absolute value, and the share of the update lost."""
    largest, lost, update = torch.tensor(blocks, dtype=torch.float64).unbind(1)
    share = float((lost.sum() / update.sum()).sqrt()) if update.any() else 0.0
    return float(largest.max()), share


def _block_error(weight: Tensor, update: Tensor, stored: Tensor) -> BlockError:
    """Measure what rounding did to a block, all in the type of the sum.

    Args:
        weight: The base weight; overwritten with the error.
        update: The exact update.
        stored: What is written for their sum.

    Returns:
        The error; its largest value is infinite or NaN if a value of the sum did not fit.
    """
    # In this order: where an update is small, the first difference is exact, and float32 sees even one that got lost.
    error = weight.sub_(stored).add_(update)
    low, high = error.aminmax()
    # abs() turns the -0.0 of an exact block into 0.0.
    return BlockError(abs(float(torch.maximum(-low, high))), _squares(error), _squares(update))


def _squares(block: Tensor) -> float:
    return float(torch.dot(block.reshape(-1), block.reshape(-1)))


def _check_fits(name: str, block: Tensor, stored: Tensor) -> None:
    # Above the limit some values still round down to it, and what is not finite in the base may stay so.
    finite = block.isfinite()
    if not bool(stored[finite].isfinite().all()):
        raise AdapterFolderError(
            f"{name} reaches {float(block[finite].abs().max()):g}, more than {stored.dtype} can hold. Choose a wider "
            "dtype."
        )
