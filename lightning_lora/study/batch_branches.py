"""Trains a branch for each batch of a probe, on the same rows in the same order.

Every branch cools down at its end, because a small batch at a high learning rate has a noisy loss otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.errors import ConfigError, DataError, GradientError
from lightning_lora.lora.adapter import remove_lora
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.merging import merge_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.comparison import Comparison, compared
from lightning_lora.study.row_losses import HeldOut
from lightning_lora.study.snapshot import copy_module, isolated


@dataclass(frozen=True)
class BatchBranches:
    """The branches of a probe: their batches, and the rows that each trains on.

    Args:
        batch_rows: Rows per step of the run.
        batches: Rows per step of each branch, ascending.
        num_rows: Rows that each branch trains on.
        num_seeds: Orders of the data to repeat each branch with; the first is the run's own.
    """

    batch_rows: int
    batches: tuple[int, ...]
    num_rows: int
    num_seeds: int = 1

    @classmethod
    def planned(
        cls, batch_rows: int, ratios: Sequence[float], min_steps: int, min_epoch: float, available: int, num_seeds: int
    ) -> BatchBranches:
        """Plan branches with ``min_steps`` steps of the largest batch, or ``min_epoch`` of the rows if that is more.

        Args:
            batch_rows: Rows per step of the run.
            ratios: Batches to try, as multiples of ``batch_rows``.
            min_steps: Least number of steps of the largest batch.
            min_epoch: Least fraction of the ``available`` rows.
            available: Training rows of the run.
            num_seeds: Orders of the data.

        Raises:
            ConfigError: If a batch would be less than one row, or there are fewer than two batches.
            DataError: If there are too few rows.
        """
        if batch_rows * min(ratios) < 1:
            raise ConfigError(f"{min(ratios):g} of a batch of {batch_rows} rows is less than a row: drop that ratio.")
        batches = sorted({round(ratio * batch_rows) for ratio in ratios})
        if len(batches) < 2:
            raise ConfigError(
                f"ratios {list(ratios)} of {batch_rows} rows all give the same batch: a probe compares at least two."
            )
        largest = batches[-1]
        num_rows = max(min_steps, math.ceil(min_epoch * available / largest)) * largest
        if num_rows > available:
            fewer = available // largest
            advice = f"lower min_steps to {fewer}, or drop" if fewer else "drop"
            raise DataError(
                f"a probe of {num_rows // largest} steps of {largest} rows needs {num_rows:,} training rows, and there "
                f"are {available:,}: {advice} the largest ratio."
            )
        return cls(batch_rows, tuple(batches), num_rows, num_seeds)

    def train(self, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut) -> dict[int, Tensor]:
        """Train all branches and score them.

        Args:
            point: The point that the branches start from.
            rows: All rows in the order of the run; seeds after the first shuffle them.
            held_out: The rows that branches are scored on.

        Returns:
            The losses ``(seeds, held-out rows)`` of each batch.

        Raises:
            GradientError: If a branch diverges.
        """
        return {batch: self._losses(point, batch, rows, held_out) for batch in self.batches}

    def _losses(self, point: BranchPoint, batch: int, rows: Sequence[Any], held_out: HeldOut) -> Tensor:
        losses = [
            point.losses_after(shuffled(rows, seed)[: self.num_rows], batch, batch / self.batch_rows, held_out, seed)
            for seed in range(self.num_seeds)
        ]
        stacked = torch.stack(losses)
        if not stacked.isfinite().all():
            raise GradientError(
                f"the branch of {batch} rows a step diverged: its held-out loss is not finite. Lower the learning "
                f"rate, or drop that ratio."
            )
        return stacked


def compare_batches(
    branches: BatchBranches, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut, full_ft: bool
) -> BatchProbeResult:
    """Train the branches and compare them; with ``full_ft`` also in full, and then all with fresh moments."""
    start = point.losses_now(held_out)
    full: dict[int, Tensor] = {}
    if full_ft:
        full = branches.train(point.with_fresh_moments(fully_trained(point.module)), rows, held_out)
        point = point.with_fresh_moments(point.module)
    losses = branches.train(point, rows, held_out)
    small, large = branches.batches[0], branches.batches[-1]
    extra = (losses[large] - full[large]) - (losses[small] - full[small]) if full else None
    return BatchProbeResult(
        batch_rows=branches.batch_rows,
        num_rows=branches.num_rows,
        num_held_out=len(start),
        num_seeds=branches.num_seeds,
        start_loss=float(start.mean()),
        losses=_means(losses),
        comparisons=compared(losses),
        full_losses=_means(full) if full else None,
        extra_cost=None if extra is None else Comparison.of(small, large, extra),
    )


def fully_trained(module: LightningModule) -> LightningModule:
    """A copy with the adapters merged and removed, in which every weight is trained.

    Raises:
        ConfigError: If there are no adapters, or a weight has a type that cannot be trained.
    """
    if not isinstance(module, LoRAMixin) or not lora_layers(module):
        raise ConfigError(f"full_ft compares LoRA with full fine-tuning: {type(module).__name__} has no adapters.")
    with isolated(module.device, 0):
        full = copy_module(module, shares_frozen=False)
        assert isinstance(full, LoRAMixin)
        merge_layers(full)
        remove_lora(full)
    full.lora = None
    for name, parameter in full.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(f"full_ft cannot train {name}, which is quantised ({parameter.dtype}).")
        parameter.requires_grad_(True)
    return full


def _means(losses: Mapping[int, Tensor]) -> dict[int, float]:
    return {batch: float(loss.mean()) for batch, loss in losses.items()}


def shuffled(rows: Sequence[Any], seed: int) -> Sequence[Any]:
    """``rows`` in an order of their own for each seed; seed 0 keeps the order of the run."""
    if seed == 0:
        return rows
    return [rows[place] for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]
