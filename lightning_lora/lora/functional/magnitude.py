"""Norms of the rows of an adapted weight, by which DoRA divides."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a block: what is held beside the weight, whatever its size.
_BLOCK = 2**22


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``||W_i + scale * (B A)_i||`` of every row, ``(out,)``, a constant for autograd.

    Rows are summed in at least float32, outside of autocast, and their squares are added in float64: rounded to float32
    the norm does then not depend on the order of additions, and is the same on every device and in compiled code.

    Args:
        weight: ``(out, in)``, in any floating-point type.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: alpha / r, dimensionless.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    # Apple's GPUs know no float64.
    exact = dtype if weight.device.type == "mps" else torch.float64
    rows = max(1, _BLOCK // weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        scaled = A.to(dtype) * scale
        sums = (torch.addmm(W.to(dtype), b.to(dtype), scaled) for W, b in _blocks(weight, B, rows))
        return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=exact) for block in sums])


def _blocks(weight: Tensor, B: Tensor, rows: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(weight.split(rows), B.split(rows), strict=True)


def magnitude_ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """``m / ||W + scale * B A||`` of every row, ``(out,)`` in the type of ``m``, differentiable by ``m`` alone.

    A row of zeros has no direction: its ratio is 1, so that its factors learn, where a division would give NaN.

    Args:
        magnitude: ``m``, ``(out,)``.
        norms: The result of `row_norms`.
    """
    norms = norms.to(magnitude.dtype)
    is_zero = norms == 0
    return torch.where(is_zero, 1.0, magnitude / norms.masked_fill(is_zero, 1.0))


def rescaled(y: Tensor, bias: Tensor | None, ratio: Tensor) -> Tensor:
    """``ratio * (y - b) + b``, and ``y`` itself, bit for bit, where the ratio is 1.

    Args:
        y: Output of an adapted layer; ``bias`` and ``ratio`` are broadcast to it.
        bias: ``b``, or None.
        ratio: The ratio of each output feature or channel.
    """
    product = y if bias is None else y - bias.to(y.dtype)
    return torch.addcmul(y, product, (ratio - 1).to(y.dtype))
