"""Which batch learns less from the same rows? Short branches from one snapshot, compared row by row.

A noise scale says what a batch should cost by a model of stochastic gradients; this trains with each batch and looks.
The learning rate follows the batch by the square-root rule, every branch cools down at its end (a small batch at a high
rate looks noisy otherwise), and the held-out losses are compared in pairs, so that what rows have in common cancels.

References:
    Merrill et al., *Critical Batch Size Revisited*, 2025, https://arxiv.org/abs/2505.23971, for branched training
    Malladi et al., *On the SDEs and Scaling Rules for Adaptive Gradient Algorithms*, 2022,
    https://arxiv.org/abs/2205.10287, for the square-root rule
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.branches import Branch, row_losses
from lightning_lora.errors import ConfigError, DataError

RATIOS = (0.25, 0.5, 1.0, 2.0)
MIN_STEPS = 64
"""Optimizer steps of the branch with the largest batch."""
COOLDOWN = 0.2
TOLERANCE = 0.005
"""Nats below which a difference is no harm."""


@dataclass(frozen=True)
class Comparison:
    """A larger batch against a smaller one on the same held-out rows.

    Args:
        small: Rows of a step.
        large: Rows of a step.
        difference: Mean of large minus small, nats; positive where the large batch has learnt less.
        error: Its standard error.
    """

    small: int
    large: int
    difference: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether the large batch is worse by more than the tolerance and two standard errors."""
        return self.difference > max(TOLERANCE, 2 * self.error)


@dataclass(frozen=True)
class BatchProbeResult:
    """What the branches show.

    Args:
        losses: Rows of a step to the mean held-out loss after its branch, nats, ascending.
        comparisons: Of every pair.
        num_rows: Rows that each branch trained on.
    """

    losses: dict[int, float]
    comparisons: tuple[Comparison, ...]
    num_rows: int

    @property
    def largest_harmless(self) -> int:
        """The largest batch that is not worse than any smaller one, nor is one between."""
        harmless = min(self.losses)
        for batch in self.losses:
            if any(pair.is_worse for pair in self.comparisons if pair.large == batch):
                break
            harmless = batch
        return harmless

    @property
    def saw_difference(self) -> bool:
        """Whether any batch was worse than a smaller one."""
        return any(pair.is_worse for pair in self.comparisons)

    def __str__(self) -> str:
        lines = [f"batch probe: {self.num_rows} rows to each of {len(self.losses)} branches"]
        lines += [f"  {batch:>6} rows a step: held-out loss {loss:.4f}" for batch, loss in self.losses.items()]
        for pair in self.comparisons:
            word = "worse" if pair.is_worse else "no difference seen"
            margin = f"{pair.difference:+.4f} +- {2 * pair.error:.4f} nats"
            lines.append(f"  {pair.large} against {pair.small}: {margin}, {word}")
        bound = "largest without measurable loss" if self.saw_difference else "no difference seen, so at least"
        return "\n".join([*lines, f"  {bound}: {self.largest_harmless} rows"])


def batch_probe(
    branch: Branch,
    batch_rows: int,
    micro_batch: int,
    held_out: tuple[DataLoader[Any], Sequence[int]],
    ratios: Sequence[float] = RATIOS,
    min_steps: int = MIN_STEPS,
    first_row: int = 0,
) -> BatchProbeResult:
    """Train a branch for each batch on the same rows in the same order, and compare them.

    Args:
        branch: The snapshot.
        batch_rows: Rows of a step in the run that is branched from.
        micro_batch: Rows that fit the device at once.
        held_out: A loader, and the rows of its dataset to compare on, 256 or more for a useful interval.
        ratios: Batches, as multiples of ``batch_rows``.
        min_steps: Optimizer steps of the largest.
        first_row: Where in the dataset of the branch to begin.

    Raises:
        ConfigError: If a batch would be less than one row.
        DataError: If the data are too short.
    """
    batches = sorted({round(ratio * batch_rows) for ratio in ratios})
    if batches[0] < 1:
        raise ConfigError(f"a batch of {batch_rows} rows has no {min(ratios):g}th part: leave that ratio out.")
    num_rows = min_steps * batches[-1]
    available = len(branch.loader.dataset) - first_row  # pyright: ignore[reportArgumentType]
    if num_rows > available:
        raise DataError(
            f"a probe of {min_steps} steps of {batches[-1]} rows needs {num_rows:,} rows, {available:,} are there: "
            f"lower min_steps to {available // batches[-1]}, or leave out the largest ratio."
        )
    rows = range(first_row, first_row + num_rows)
    losses: dict[int, Tensor] = {}
    for batch in batches:
        arm = branch.train(rows, batch, math.gcd(batch, micro_batch), math.sqrt(batch / batch_rows), COOLDOWN)
        losses[batch] = row_losses(arm, *held_out)
    pairs = [(small, large) for small in batches for large in batches if small < large]
    return BatchProbeResult(
        losses={batch: float(loss.mean()) for batch, loss in losses.items()},
        comparisons=tuple(_compare(small, large, losses[large] - losses[small]) for small, large in pairs),
        num_rows=num_rows,
    )


def _compare(small: int, large: int, differences: Tensor) -> Comparison:
    error = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    return Comparison(small, large, float(torch.mean(differences)), error)
