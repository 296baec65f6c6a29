"""What a measured step says about the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_lora.batch.noise.noise_scale import signal_and_trace


class StepSample(NamedTuple):
    """What one step says.

    Args:
        signal: Unbiased ``|G|^2``.
        trace: Unbiased ``tr(Sigma)`` of a row.
        num_rows: Rows of the step, all ranks.
        num_micro_batches: Independent ones among them.
    """

    signal: float
    trace: float
    num_rows: int
    num_micro_batches: int


def step_samples(
    spaces: Sequence[str],
    squares: Tensor,
    mean_squares: Tensor,
    rows: Tensor,
    weights: Tensor,
    averaged_ranks: int,
    unit: float,
) -> dict[str, StepSample]:
    """Samples from what has been added to the gradient of a step, each part scaled by its weight.

    Args:
        spaces: Names of the measures.
        squares: ``(spaces, K)``, square norms of the parts.
        mean_squares: ``(spaces,)``, of their sum, averaged over ranks.
        rows: ``(K,)``, in each part.
        weights: ``(K,)``, of each part in the mean over the step; they sum to one.
        averaged_ranks: Ranks over which the sum was averaged, as the parts were not.
        unit: What the sum is multiplied by to be a mean.
    """
    # The weighted mean of the parts' own gradients is what the optimizer gets.
    factor = 1 / (weights * averaged_ranks)
    signals, traces = signal_and_trace(squares.cpu() * factor.square(), mean_squares.cpu(), rows, weights)
    return {
        space: StepSample(signal * unit**2, trace * unit**2, round(float(rows.sum())), len(rows))
        for space, signal, trace in zip(spaces, signals.tolist(), traces.tolist(), strict=True)
        if math.isfinite(signal) and math.isfinite(trace)
    }
