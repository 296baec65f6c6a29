"""Trains a branch with adapters of a higher rank and one without, on the same rows in the same order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.errors import GradientError, ProbeError, ResultFileError
from lightning_lora.lora.growth import grow_adapters
from lightning_lora.lora.layers.adapted import learning_weights
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.comparison import Comparison
from lightning_lora.study.rank_probe_result import RankProbeResult
from lightning_lora.study.row_losses import HeldOut
from lightning_lora.study.snapshot import copy_module, isolated


@dataclass(frozen=True)
class RankBranches:
    """The two branches of a rank probe.

    Args:
        num_rows: Rows that each branch trains on.
        num_seeds: Orders of the data, and draws of the new directions, to repeat both branches with.
        factor: What the rank is multiplied with.
    """

    batch_rows: int
    num_rows: int
    num_seeds: int = 1
    factor: int = 2

    @classmethod
    def planned(
        cls, batch_rows: int, min_steps: int, min_epoch: float, available: int, num_seeds: int, factor: int
    ) -> RankBranches:
        """Plan branches of ``min_steps`` steps, or ``min_epoch`` of the rows if that is more.

        Raises:
            DataError: If there are too few rows.
        """
        num_steps = max(min_steps, math.ceil(min_epoch * available / batch_rows))
        if num_steps * batch_rows > available:
            fewer = available // batch_rows
            advice = f"lower min_steps to {fewer}" if fewer else "use a smaller batch"
            raise ResultFileError(
                f"a probe of {num_steps} steps of {batch_rows} rows needs {num_steps * batch_rows:,} training rows, "
                f"and there are {available:,}: {advice}."
            )
        return cls(batch_rows, num_steps * batch_rows, num_seeds, factor)

    def compare(self, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut) -> RankProbeResult:
        """Train both branches, with fresh moments, and compare them.

        Args:
            rows: All rows in the order of the run; seeds after the first shuffle them.

        Raises:
            ConfigError: If no rank can be raised.
            GradientError: If a branch diverges.
        """
        ranks = raised_ranks(point.module, self.factor)
        start = point.losses_now(held_out)
        control, grown = [], []
        for seed in range(self.num_seeds):
            wider = point.with_fresh_moments(grown_module(point.module, ranks, seed))
            order = shuffled(rows, seed)[: self.num_rows]
            control.append(self._losses(point.with_fresh_moments(point.module), order, held_out, seed, "control"))
            grown.append(self._losses(wider, order, held_out, seed, "grown"))
        before, after = (_typical(trained_ranks(point.module, each)) for each in (adapted_ranks(point.module), ranks))
        difference = Comparison.of(before, after, torch.stack(grown) - torch.stack(control))
        return RankProbeResult(
            rank=before,
            grown_rank=after,
            batch_rows=self.batch_rows,
            num_rows=self.num_rows,
            num_held_out=len(start),
            num_seeds=self.num_seeds,
            start_loss=float(start.mean()),
            control_loss=float(torch.stack(control).mean()),
            grown_loss=float(torch.stack(grown).mean()),
            error=difference.error,
            freedom=difference.freedom,
        )

    def _losses(self, point: BranchPoint, rows: Sequence[Any], held_out: HeldOut, seed: int, arm: str) -> Tensor:
        losses = point.losses_after(rows, self.batch_rows, 1.0, held_out, seed)
        if not losses.isfinite().all():
            raise GradientError(
                f"the {arm} branch diverged: its held-out loss is not finite. Lower the learning rate, or probe later."
            )
        return losses


def shuffled(rows: Sequence[Any], seed: int) -> Sequence[Any]:
    """``rows`` in an order of their own for each seed; seed 0 keeps the order of the run."""
    if seed == 0:
        return rows
    return [rows[place] for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]


def adapted_ranks(module: LightningModule) -> dict[str, int]:
    """Name of every adapted weight that is trained to its rank."""
    return {name: layer.lora_specs[weight].rank for name, (layer, weight) in learning_weights(module).items()}


def trained_ranks(module: LightningModule, ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks without the components that stay as they start (``init="pissa"``)."""
    weights = learning_weights(module)
    return {name: rank - weights[name][0].lora_specs[weights[name][1]].start for name, rank in ranks.items()}


def raised_ranks(module: LightningModule, factor: int) -> dict[str, int]:
    """Name of every adapted weight to the rank that trains ``factor`` times as many components.

    The rank is at most the full rank of the weight.

    Raises:
        ConfigError: If nothing is adapted, or every weight has its full rank.
    """
    ranks, weights = adapted_ranks(module), learning_weights(module)
    if not ranks:
        raise ProbeError(f"a rank probe raises the rank of adapters: {type(module).__name__} has no adapters.")
    raised = {}
    for name, rank in ranks.items():
        layer, weight = weights[name]
        shape, start = layer.weights(layer)[weight], layer.lora_specs[weight].start
        raised[name] = max(rank, min((rank - start) * factor + start, shape.num_in, shape.num_out))
    if raised == ranks:
        raise ProbeError("every adapted weight has its full rank already: there is no higher rank to probe.")
    return raised


def grown_module(module: LightningModule, ranks: dict[str, int], seed: int) -> LightningModule:
    """A copy of ``module`` with higher ranks, which computes the same."""
    with isolated(module.device, seed):
        grown = copy_module(module)
        grow_adapters(grown, ranks)
    return grown


def _typical(ranks: dict[str, int]) -> int:
    """The rank of most weights; narrow weights and patterns may have others."""
    counts = sorted(ranks.values())
    return max(dict.fromkeys(counts), key=counts.count)
