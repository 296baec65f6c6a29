"""The meaning of a noise scale for the batch of a run, in one of five words.

With ``fill = B / (c B_simple)``, a batch of ``B`` rows makes ``1 / (1 + fill)`` of the progress per row that single
rows would make (McCandlish et al. 2018, section 2.2). ``c`` maps the noise scale to the batch that a `BatchProbe` found
harmless. Without a probe ``c`` is 1, and the words show a trend only: under Adam the noise scale was far below the
critical batch (Merrill et al. 2025, https://arxiv.org/abs/2505.23971).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.effective_batch import EffectiveBatch

BatchState = Literal["inconclusive", "noise-limited", "transition", "signal-limited", "step-starved"]

MIN_MEASURED = 25
"""Measured steps needed before an interval is used; also the length of a window."""
NOISE_LIMITED = 0.2
"""Fill that costs 20 % more rows than tiny batches: the convention of Zhang et al. 2024, arXiv 2410.21676."""
SIGNAL_LIMITED = 1.0
"""Fill at which half of every row is wasted."""
PATIENCE = 3
"""Windows in a row that must agree before a run is called signal-limited."""
MIN_STEPS, GOOD_STEPS = 100, 1000
"""Optimizer steps that a run needs, and should have: tinker-cookbook's hyperparameter guide."""
LARGEST_SWEPT = 128
"""Largest batch, in rows, of published sweeps of fine-tuning: tinker-cookbook."""


@dataclass(frozen=True)
class BatchReading:
    """The state of a batch and the numbers behind it.

    Args:
        state: One of five words, see ``docs/understand/batch_size.md``.
        fill: Batch over calibrated noise scale; NaN while inconclusive.
        fill_low: Lower end of the interval of ``fill``.
        fill_high: Upper end of the interval of ``fill``; infinity where the noise scale may be zero.
    """

    state: BatchState
    fill: float
    fill_low: float
    fill_high: float

    @property
    def efficiency(self) -> float:
        """Progress per row by the model, relative to tiny batches; NaN while inconclusive."""
        return 1 / (1 + self.fill)


def read_batch(
    estimate: NoiseScale | None,
    num_measured: int,
    batch_rows: int,
    num_steps: float,
    calibration: float = 1.0,
    full_windows: int = 0,
) -> BatchReading:
    """Read what an estimate means for a batch.

    Args:
        estimate: The noise scale of the adapter gradient; None before the first sample.
        num_measured: Optimizer steps that were measured.
        num_steps: Optimizer steps of the whole run; infinity if the run has no end.
        calibration: ``c``, from a probe.
        full_windows: Preceding windows in a row whose fill was above 1 with certainty.
    """
    if estimate is None or not estimate.conclusive or num_measured < MIN_MEASURED:
        state: BatchState = "step-starved" if num_steps < MIN_STEPS else "inconclusive"
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
    """One sentence that says what a reading means for the batch of a run, and what to change."""
    match reading.state:
        case "inconclusive":
            return (
                "no verdict yet: the noise of the gradient hides its mean. Train longer, or raise "
                "accumulate_grad_batches."
            )
        case "noise-limited":
            return "a larger batch would learn as much from every row, if the device has room for it."
        case "transition" if reading.fill_low > SIGNAL_LIMITED:
            return (
                f"fill {reading.fill:.2g}, certainly above 1: the batch is too large if {PATIENCE} windows in a row "
                f"agree."
            )
        case "transition":
            return f"fill {reading.fill:.2g}: the batch is neither clearly too large nor clearly too small."
        case "signal-limited":
            return f"by the model each row teaches {reading.efficiency:.0%} of what it could: {_smaller(batch, 2)}."
        case "step-starved":
            needed = math.ceil(MIN_STEPS / max(num_steps, 1))
            few = f"{count_of(num_steps, 'optimizer step')} {'is' if num_steps == 1 else 'are'} few whatever the noise"
            if batch.rows < needed * batch.num_ranks:  # not even with a row a step on each device
                return (
                    f"{few}: train on more rows, or for {needed} times as many epochs, for {MIN_STEPS} steps; "
                    f"{GOOD_STEPS} are better."
                )
            return f"{few}: {_smaller(batch, needed)} (or more epochs) for {MIN_STEPS} steps; {GOOD_STEPS} are better."


def _smaller(batch: EffectiveBatch, divisor: int) -> str:
    """The setting that makes a batch smaller by ``divisor``."""
    if batch.accumulation >= divisor:
        fewer = batch.accumulation // divisor
        rows = batch.micro_batch * fewer * batch.num_ranks
        return f"set accumulate_grad_batches={fewer} for {count_of(rows, 'row')} a step"
    fewest = batch.rows // divisor
    if fewest < batch.num_ranks:
        return f"a step of {count_of(batch.rows, 'row')} is the smallest there is"
    return f"set a batch of {count_of(fewest, 'row')} a step (now {batch.rows})"


def count_of(number: float, thing: str) -> str:
    """A number of things.

    >>> count_of(1, "row"), count_of(12, "row")
    ('1 row', '12 rows')
    """
    return f"{number:.0f} {thing}{'' if number == 1 else 's'}"
