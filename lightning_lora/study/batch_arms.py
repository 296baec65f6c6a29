"""The arms of a batch probe: a branch for each batch, on the same rows in the same order.

Every branch cools down at its end: a small batch at a high rate looks noisy otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.errors import ConfigError, DataError, GradientError
from lightning_lora.lora.adapter import merge_layers, remove_lora
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.study.batch_probe_result import BatchProbeResult, Comparison
from lightning_lora.study.branch import Branch, present_phase
from lightning_lora.study.snapshot import apart, copied

HeldOut = tuple[DataLoader[Any], Sequence[int]]


@dataclass(frozen=True)
class Arms:
    """What will be trained.

    Args:
        batch_rows: Rows of a step of the run.
        batches: Rows of a step of each arm, ascending.
        num_rows: Rows that each is trained on.
        num_seeds: Orders of the data; the first is the run's own.
    """

    batch_rows: int
    batches: tuple[int, ...]
    num_rows: int
    num_seeds: int = 1

    @classmethod
    def planned(
        cls, batch_rows: int, ratios: Sequence[float], min_steps: int, min_epoch: float, available: int, num_seeds: int
    ) -> Arms:
        """As many rows as the largest batch needs for ``min_steps``, or ``min_epoch`` of the ``available`` ones.

        Raises:
            ConfigError: If a batch would be less than one row, or there are not two.
            DataError: If there are too few rows.
        """
        if batch_rows * min(ratios) < 1:
            raise ConfigError(f"a batch of {batch_rows} rows has no {min(ratios):g}th part: leave that ratio out.")
        batches = sorted({round(ratio * batch_rows) for ratio in ratios})
        if len(batches) < 2:
            raise ConfigError(f"ratios {list(ratios)} of {batch_rows} rows make one batch: a probe compares two.")
        largest = batches[-1]
        num_rows = max(min_steps, math.ceil(min_epoch * available / largest)) * largest
        if num_rows > available:
            fewer = available // largest
            advice = f"lower min_steps to {fewer}, or leave out" if fewer else "leave out"
            raise DataError(
                f"a probe of {num_rows // largest} steps of {largest} rows needs {num_rows:,} rows, {available:,} are "
                f"there: {advice} the largest ratio."
            )
        return cls(batch_rows, tuple(batches), num_rows, num_seeds)

    def train(self, branch: Branch, rows: Sequence[Any], held_out: HeldOut) -> dict[int, Tensor]:
        """Losses after each arm, ``(seeds, held-out rows)``.

        Args:
            branch: What they start from.
            rows: All rows in the order of the run; further seeds take them in orders of their own.
            held_out: What they are scored on.

        Raises:
            GradientError: If a branch diverges.
        """
        return {batch: self._arm(branch, batch, rows, held_out) for batch in self.batches}

    def _arm(self, branch: Branch, batch: int, rows: Sequence[Any], held_out: HeldOut) -> Tensor:
        losses = [
            branch.losses_after(_shuffled(rows, seed)[: self.num_rows], batch, batch / self.batch_rows, held_out, seed)
            for seed in range(self.num_seeds)
        ]
        stacked = torch.stack(losses)
        if not stacked.isfinite().all():
            raise GradientError(
                f"the branch of {batch} rows a step diverged: its held-out loss is not finite. Lower the "
                f"learning rate, or leave that ratio out."
            )
        return stacked


def probe_arms(arms: Arms, branch: Branch, rows: Sequence[Any], held_out: HeldOut, full_ft: bool) -> BatchProbeResult:
    """Train the arms and compare them; with ``full_ft`` also those of full fine-tuning, both with fresh moments."""
    start = branch.losses_now(held_out)
    full: dict[int, Tensor] = {}
    if full_ft:
        phase = present_phase(branch.optimizer_state) if branch.optimizer_state is not None else branch.rate_factor
        fresh = (None, branch.loader, branch.micro_batch, branch.trainer_options, phase)
        full = arms.train(Branch(fully_trained(branch.module), *fresh), rows, held_out)
        branch = Branch(branch.module, *fresh)
    losses = arms.train(branch, rows, held_out)
    small, large = arms.batches[0], arms.batches[-1]
    extra = (losses[large] - full[large]) - (losses[small] - full[small]) if full else None
    return BatchProbeResult(
        batch_rows=arms.batch_rows,
        num_rows=arms.num_rows,
        num_held_out=len(start),
        num_seeds=arms.num_seeds,
        start_loss=float(start.mean()),
        losses=_means(losses),
        comparisons=compared(losses),
        full_losses=_means(full) if full else None,
        extra_cost=None if extra is None else Comparison.of(small, large, extra),
    )


def compared(losses: Mapping[int, Tensor]) -> tuple[Comparison, ...]:
    """Every pair of batches, from losses ``(seeds, rows)``."""
    pairs = [(small, large) for small in losses for large in losses if small < large]
    return tuple(Comparison.of(small, large, losses[large] - losses[small]) for small, large in pairs)


def fully_trained(module: LightningModule) -> LightningModule:
    """A copy with the adapters folded in and taken off, in which every weight is trained.

    Raises:
        ConfigError: If there are no adapters, or a weight is of a type that cannot be trained.
    """
    if not isinstance(module, LoRAMixin) or not lora_layers(module):
        raise ConfigError(f"full_ft compares LoRA with full fine-tuning: {type(module).__name__} has no adapters.")
    with apart(module.device, 0):
        full = copied(module, shares_frozen=False)
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


def _shuffled(rows: Sequence[Any], seed: int) -> Sequence[Any]:
    if seed == 0:
        return rows
    return [rows[place] for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]
