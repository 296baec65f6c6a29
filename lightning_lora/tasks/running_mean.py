"""A mean over an evaluation that keeps its digits at every precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self, override


class RunningMean(Metric):
    """The mean of values that arrive a few at a time, over all ranks, in float64 whatever the type of the module.

    The precisions ``bf16-true`` and ``16-true`` convert a module with all its metrics. Sums of thousands of values
    would then keep two or three digits, too few to compare losses or to choose a checkpoint. An Apple GPU has no
    float64, and sums in float32.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, values: Tensor, count: Tensor | int) -> None:
        """Add the sum of ``values``, and ``count`` to the number they are divided by."""
        self.total += values.detach().sum(dtype=self.total.dtype)
        self.count += count

    @override
    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / self.count

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Move as the module moves, but keep the type."""
        device: Any = fn(torch.zeros(1, device=self.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        super()._apply(lambda tensor: _moved(tensor, device, dtype), exclude_state)
        return self


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Modules that are built without memory have their metrics there too.
    return torch.zeros_like(tensor, device=device, dtype=dtype) if tensor.is_meta else tensor.to(device, dtype)
