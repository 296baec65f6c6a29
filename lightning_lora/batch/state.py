"""What a noise scale says about the batch of a run, in one of five words.

With ``fill = B / (c B_simple)``, a batch of ``B`` rows makes ``1 / (1 + fill)`` of the progress per row that single
rows would make (McCandlish et al. 2018, section 2.2). ``c`` maps the noise scale to the batch that a `BatchProbe` found
harmless; without one it is 1 and the words are a trend, not a verdict: under Adam the noise scale was far below the
critical batch (Merrill et al. 2025, https://arxiv.org/abs/2505.23971).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.effective_batch import EffectiveBatch

State = Literal["inconclusive", "noise-limited", "transition", "signal-limited", "step-starved"]

MIN_MEASURED = 25
"""Measured steps below which no interval is believed."""
NOISE_LIMITED = 0.2
"""Fill that costs 20 % more rows than tiny batches: the convention of Zhang et al. 2024, arXiv 2410.21676."""
SIGNAL_LIMITED = 1.0
"""Fill at which half of every row is wasted."""
PATIENCE = 3
"""Windows in a row that must agree before a run is called signal-limited."""
MIN_STEPS, GOOD_STEPS = 100, 1000
"""Optimizer steps a run needs, and should have: tinker-cookbook's hyperparameter guide."""
LARGEST_SWEPT = 128
"""Rows per step up to which the published sweeps of fine-tuning go: tinker-cookbook."""


@dataclass(frozen=True)
class BatchReading:
    """The numbers behind a state.

    Args:
        state: One of the five words.
        fill: Batch over calibrated noise scale; NaN while inconclusive.
        fill_low: Lower end of its interval.
        fill_high: Upper end; infinity where the noise scale may be zero.
    """

    state: State
    fill: float
    fill_low: float
    fill_high: float

    @property
    def efficiency(self) -> float:
        """Modelled progress per row, relative to tiny batches; NaN while inconclusive."""
        return 1 / (1 + self.fill)


def read_batch(
    estimate: NoiseScale | None,
    num_measured: int,
    batch_rows: int,
    num_steps: float,
    calibration: float = 1.0,
    full_windows: int = 0,
) -> BatchReading:
    """Judge a batch.

    Args:
        estimate: The noise scale of the adapter gradient; None before there is one.
        num_measured: Optimizer steps it was measured in.
        batch_rows: Rows per optimizer step.
        num_steps: Optimizer steps of the whole run; infinity if it has no end.
        calibration: ``c``, from a probe.
        full_windows: Windows in a row, before this one, whose fill was above 1 for sure.
    """
    if estimate is None or not estimate.conclusive or num_measured < MIN_MEASURED:
        state: State = "step-starved" if num_steps < MIN_STEPS else "inconclusive"
        return BatchReading(state, math.nan, 0.0, math.inf)
    scaled = [calibration * scale for scale in (estimate.value, estimate.low, estimate.high)]
    fill, high, low = (batch_rows / scale if scale > 0 else math.inf for scale in scaled)
    if num_steps < MIN_STEPS:
        state = "step-starved"
    elif high < NOISE_LIMITED:
        state = "noise-limited"
    elif low > SIGNAL_LIMITED and full_windows + 1 >= PATIENCE:
        state = "signal-limited"
    else:
        state = "transition"
    return BatchReading(state, fill, low, high)


def advice(reading: BatchReading, batch: EffectiveBatch, num_steps: float) -> str:
    """What a state means for the batch of a run, in one sentence that names what to change."""
    match reading.state:
        case "inconclusive":
            return "the noise hides the signal so far: more steps, or more micro-batches a step, would show it."
        case "noise-limited":
            return "larger batches would learn as much from every row, if the device has room."
        case "transition" if reading.fill_low > SIGNAL_LIMITED:
            return f"fill {reading.fill:.2g}, surely above 1: too large a batch, if {PATIENCE} windows in a row say so."
        case "transition":
            return f"fill {reading.fill:.2g}: neither clearly too large nor clearly small."
        case "signal-limited":
            return f"each row teaches {reading.efficiency:.0%} of what it could, by the model: {_smaller(batch, 2)}."
        case "step-starved":
            needed = math.ceil(MIN_STEPS / max(num_steps, 1))
            return (
                f"{num_steps:.0f} optimizer steps are few whatever the noise: {_smaller(batch, needed)} "
                f"(or more epochs) for {MIN_STEPS} steps; {GOOD_STEPS} are better."
            )


def _smaller(batch: EffectiveBatch, divisor: int) -> str:
    """How to make a batch that much smaller."""
    if batch.accumulation >= divisor:
        fewer = batch.accumulation // divisor
        rows = batch.micro_batch * fewer * batch.num_ranks
        return f"set accumulate_grad_batches={fewer} for {rows} rows a step"
    fewest = max(1, batch.rows // divisor)
    return f"set a batch of {fewest} rows a step (now {batch.rows})"
