"""The speed of a matrix product on a device here, where there is no data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SIDES = {"cpu": 768}
"""Side of the square product by kind of device: milliseconds on a core, enough for a GPU to be busy."""
_OTHER_SIDE, _SECONDS = 4096, 0.15


def product_speed(dtype: str, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a product of two square matrices, the best of those that fit into 0.15 seconds."""
    side = _SIDES.get(device, _OTHER_SIDE)
    left, right = (torch.ones(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best, begun, count = float("inf"), clock(), 0
    # The first product prepares what the others use.
    while count < 3 or clock() - begun < _SECONDS:
        start = clock()
        torch.mm(left, right)
        if device != "cpu":
            torch.accelerator.synchronize()
        best, count = min(best, clock() - start), count + 1
    return 2 * side**3 / best
