"""The two narrow products of a backward pass, ``y B`` and ``y^T S``, from one read of ``y``.

Each program reads a block of rows over a span of columns once and writes its share of both products in float32; one sum
over the shares follows. No atomic additions, so the same inputs give the same bits.

Shape legend: ``T`` rows, ``out`` columns of ``y``, ``r`` rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.lora.functional.torch_internals import uninitialised

COLUMNS = 64
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
# Rows are not enough programs for a large device; below this many their columns are divided too.
_PROGRAMS = 256


def both_narrow(result: Tensor, y: Tensor, B: Tensor, S: Tensor, scale: float) -> Tensor:
    """Write ``scale * y B`` to ``result`` and return ``y^T S``, ``(out, r)`` in float32; sums are float32 throughout.

    Args:
        result: ``(T, r)``.
        y: ``(T, out)``.
        B: ``(out, r)``, of the type of ``y``, at most 128 columns.
        S: ``(T, r)``, of the type of ``y``.
        scale: Factor of the first product.
    """
    (count, out), rank = y.shape, B.shape[1]
    width = max(16, triton.next_power_of_2(rank))
    rows = block_rows(width, y.element_size())
    row_blocks, column_blocks = triton.cdiv(count, rows), triton.cdiv(out, COLUMNS)
    spans = min(column_blocks, triton.cdiv(_PROGRAMS, row_blocks))
    span = triton.cdiv(column_blocks, spans) * COLUMNS
    spans = triton.cdiv(out, span)
    by_rows = uninitialised(y, (spans, count, rank), torch.float32)
    by_columns = uninitialised(y, (row_blocks, out, rank), torch.float32)
    strides = (*y.stride(), *B.stride(), *S.stride())
    with torch.cuda.device_of(y):
        _both[row_blocks, spans](  # pyright: ignore[reportIndexIssue]
            y, B, S, by_rows, by_columns, *strides, count, out, rank, span, scale,
            ROWS=rows, COLUMNS=COLUMNS, WIDTH=width, **OPTIONS,
        )  # fmt: skip
    result.copy_(by_rows.sum(0))
    return by_columns.sum(0)


def block_rows(width: int, element_size: int) -> int:
    """Rows of a block, so that it fits into registers and shared memory: fewer for large ranks and wide types."""
    return min(8192 // width, 512 // element_size, 256)


@triton.jit
def _both(
    y, B, S, by_rows, by_columns,
    y_row, y_column, B_row, B_column, S_row, S_column,
    count, out, rank, span, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, r = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row, is_r = row[:, None] < count, r[None, :] < rank
    s = tl.load(S + row[:, None] * S_row + r[None, :] * S_column, mask=is_row & is_r, other=0)
    product = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, out), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < out
        values = tl.load(
            y + row[:, None] * y_row + column[None, :] * y_column, mask=is_row & is_column[None, :], other=0
        )
        b = tl.load(B + column[:, None] * B_row + r[None, :] * B_column, mask=is_column[:, None] & is_r, other=0)
        product = tl.dot(values, b, product, input_precision="ieee")
        transposed = tl.dot(tl.trans(values), s, input_precision="ieee")
        place = by_columns + (block * out + column[:, None]) * rank + r[None, :]
        tl.store(place, transposed, mask=is_column[:, None] & is_r)
    tl.store(by_rows + (part * count + row[:, None]) * rank + r[None, :], product * scale, mask=is_row & is_r)
