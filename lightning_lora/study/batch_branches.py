"""Trains a branch for each batch of a probe, on the same rows in the same order.

Every branch cools down at its end, because a small batch at a high learning rate has a noisy loss otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_lora.errors import GradientError, ProbeError, ResultFileError
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.comparison import compared
from lightning_lora.study.row_losses import HeldOut


@dataclass(frozen=True)
class BatchBranches:
    """The branches of a probe: their batches, and the rows that each trains on.

    Args:
        batches: Rows per step of each branch, ascending.
        num_rows: Rows that each branch trains on.
    """

    batch_rows: int
    batches: tuple[int, ...]
    num_rows: int

    @classmethod
    def planned(
        cls, batch_rows: int, ratios: Sequence[float], min_steps: int, min_epoch: float, available: int
    ) -> BatchBranches:
        """Plan branches with ``min_steps`` steps of the largest batch, or ``min_epoch`` of the rows if that is more.

        Raises:
            ConfigError: If a batch would be less than one row, or there are fewer than two batches.
            DataError: If there are too few rows.
        """
        if batch_rows * min(ratios) < 1:
            raise ProbeError(f"{min(ratios):g} of a batch of {batch_rows} rows is less than a row: drop that ratio.")
        batches = sorted({round(ratio * batch_rows) for ratio in ratios})
        if len(batches) < 2:
            raise ProbeError(
                f"ratios {list(ratios)} of {batch_rows} rows all give the same batch: a probe compares at least two."
            )
        largest = batches[-1]
        num_rows = max(min_steps, math.ceil(min_epoch * available / largest)) * largest
        if num_rows > available:
            fewer = available // largest
            advice = f"lower min_steps to {fewer}, or drop" if fewer else "drop"
            raise ResultFileError(
                f"a probe of {num_rows // largest} steps of {largest} rows needs {num_rows:,} training rows, and there "
                f"are {available:,}: {advice} the largest ratio."
            )
        return cls(batch_rows, tuple(batches), num_rows)

    def train(self, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut) -> dict[int, Tensor]:
        """Train all branches and score them.

        Args:
            point: The point that the branches start from.
            rows: All rows in the order of the run.
            held_out: The rows that branches are scored on.

        Returns:
            The losses ``(1, held-out rows)`` of each batch: one order of the data.

        Raises:
            GradientError: If a branch diverges.
        """
        return {batch: self._losses(point, batch, rows, held_out) for batch in self.batches}

    def _losses(self, point: BranchPoint, batch: int, rows: Sequence[Any], held_out: HeldOut) -> Tensor:
        losses = point.losses_after(rows[: self.num_rows], batch, batch / self.batch_rows, held_out)
        if not losses.isfinite().all():
            raise GradientError(
                f"the branch of {batch} rows a step diverged: its held-out loss is not finite. Lower the learning "
                f"rate, or drop that ratio."
            )
        return losses[None]


def compare_batches(
    branches: BatchBranches, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut
) -> BatchProbeResult:
    """Train the branches and compare them."""
    start = point.losses_now(held_out)
    losses = branches.train(point, rows, held_out)
    return BatchProbeResult(
        batch_rows=branches.batch_rows,
        num_rows=branches.num_rows,
        num_held_out=len(start),
        start_loss=float(start.mean()),
        losses={batch: float(loss.mean()) for batch, loss in losses.items()},
        comparisons=compared(losses),
    )
