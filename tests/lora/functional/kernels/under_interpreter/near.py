"""How far a result of one type may be from float64: one rounding, and what float32 loses on the way.

The interpreter rounds to bfloat16 by cutting off digits, where a GPU takes the nearest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_rounded_once(found: Tensor, right: Tensor, lost: float = 2e-6) -> None:
    """Each value is the right one rounded, but for ``lost``, relative to the largest value."""
    assert found.shape == right.shape
    info = torch.finfo(found.dtype)
    largest = float(right.abs().max()) if right.numel() else 0.0
    one_rounding = info.eps if found.dtype is torch.bfloat16 else info.eps / 2
    torch.testing.assert_close(
        found.double(), right, rtol=one_rounding + lost, atol=lost * largest + info.smallest_normal * info.eps
    )
