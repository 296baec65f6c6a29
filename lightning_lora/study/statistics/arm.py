"""The verdict runs of one arm: the losses of each seed, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lora.errors import ResultFileError


@dataclass(frozen=True)
class Arm:
    """One way to train, run with several fresh seeds at its chosen learning rate.

    Args:
        name: Its name in sentences: ``"rank 16"``, ``"full fine-tuning"``.
        losses: Seed to the loss of each verdict row ``(rows,)``, nats per supervised token, or to one number for all
            rows. A run that ended with NaN is here with NaN.
        base_loss: Loss of the untrained base on the verdict rows; a run that ends above it has diverged.
        problem: Why the chosen learning rate cannot be trusted, such as "best rate at the edge of the sweep".
    """

    name: str
    losses: Mapping[int, ArrayLike]
    failed: Mapping[int, str] = field(default_factory=dict)
    base_loss: float = math.inf
    problem: str = ""

    def rows(self, seed: int) -> NDArray[np.float64]:
        """``(rows,)`` losses of a seed; ``(1,)`` where it has one number for all rows."""
        return np.atleast_1d(np.asarray(self.losses[seed], dtype=np.float64))

    def means(self, tokens: ArrayLike | None = None) -> dict[int, float]:
        """Seed to the mean loss over rows, weighed by their supervised tokens.

        Raises:
            DataError: If ``tokens`` does not fit the rows.
        """
        means = {}
        for seed in sorted(self.losses):
            rows = self.rows(seed)
            # One number for all rows has been weighed already.
            weights = None if tokens is None or len(rows) == 1 else np.asarray(tokens, dtype=np.float64)
            if weights is not None and weights.shape != rows.shape:
                raise ResultFileError(
                    f"{self.name}, seed {seed}, has {len(rows)} rows, and tokens have {weights.shape}."
                )
            means[seed] = float(np.average(rows, weights=weights))
        return means

    def diverged(self, tokens: ArrayLike | None = None) -> list[int]:
        """Seeds whose loss is not finite, or above that of the untrained base."""
        means = self.means(tokens)
        return [seed for seed, mean in means.items() if not math.isfinite(mean) or mean > self.base_loss]

    def worst(self, tokens: ArrayLike | None = None) -> tuple[int, float] | None:
        """The seed with the highest loss, and that loss; a diverged seed with NaN is the worst of all."""
        means = self.means(tokens)
        return max(means.items(), key=lambda each: (math.isnan(each[1]), each[1])) if means else None

    def relabelled(self, seeds: Mapping[int, int]) -> Arm:
        """This arm with other seeds in the place of its own, to compare an arm with itself (A/A): the noise floor."""
        losses = {seeds[seed]: loss for seed, loss in self.losses.items()}
        failed = {seeds[seed]: reason for seed, reason in self.failed.items()}
        return Arm(self.name, losses, failed, self.base_loss, self.problem)
