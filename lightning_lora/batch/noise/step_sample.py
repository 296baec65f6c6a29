"""The result of one measured step: signal and trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_lora.batch.noise.noise_scale import signal_and_trace


class StepSample(NamedTuple):
    """Signal and trace of one optimizer step.

    Args:
        signal: Unbiased estimate of ``|G|^2``.
        trace: Unbiased estimate of ``tr(Sigma)`` of a row.
        num_rows: Rows of the step on all ranks.
        num_micro_batches: Independent samples in the step: micro-batches, or rows where rows are compared.
    """

    signal: float
    trace: float
    num_rows: int
    num_micro_batches: int

    def scaled(self, mean_factor: float) -> StepSample:
        """The sample of gradients that are ``mean_factor`` times as large."""
        return self._replace(signal=self.signal * mean_factor**2, trace=self.trace * mean_factor**2)


def step_samples(
    metrics: Sequence[str], squares: Tensor, mean_squares: Tensor, rows: Tensor, shares: Tensor
) -> dict[str, StepSample]:
    """Samples by metric, from the parts that were added up to the gradient of a step.

    A part is the gradient of one micro-batch or row times its share. Samples that are not finite are left out.

    Args:
        squares: ``(metrics, K)``, square norms of the parts.
        mean_squares: ``(metrics,)``, square norms of the gradient that the optimizer gets.
        rows: ``(K,)``, rows of each part.
        shares: ``(K,)``, the factor of each part's own gradient. The weights of the mean are proportional to it.
    """
    # The optimizer gets the weighted mean of the parts' own gradients.
    factor = 1 / shares
    signals, traces = signal_and_trace(squares.cpu() * factor.square(), mean_squares.cpu(), rows, shares)
    return {
        metric: StepSample(signal, trace, round(float(rows.sum())), len(rows))
        for metric, signal, trace in zip(metrics, signals.tolist(), traces.tolist(), strict=True)
        if math.isfinite(signal) and math.isfinite(trace)
    }
