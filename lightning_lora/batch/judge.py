"""The state of a run's batch as samples of its noise scale come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.batch.history import NoiseHistory
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.state import MIN_MEASURED, read_batch

MIN_HALF_LIFE = 2000.0
"""Rows."""


class BatchJudge:
    """Keeps the latest estimate and what it says.

    Attributes:
        history: The samples.
        estimate: The noise scale, rows; None before the first sample.
        reading: The state and the numbers behind it.
    """

    def __init__(self) -> None:
        self.history = NoiseHistory(MIN_HALF_LIFE, MIN_MEASURED)
        self.restart()

    def restart(self) -> None:
        """Forget what was measured: the batch has changed, and the signal with it."""
        self.history.clear()
        self.estimate: NoiseScale | None = None
        self.reading = read_batch(None, 0, 0, float("inf"))
        self._full_windows = 0

    def judge(self, batch_rows: int, num_steps: float, calibration: float) -> None:
        """Read the batch from what is there.

        Args:
            batch_rows: Rows per optimizer step.
            num_steps: Optimizer steps of the whole run.
            calibration: Harmless batch over noise scale.
        """
        count = self.history.num_measured
        # Between the ends of windows a state may be lost, but "signal-limited" is found at one only.
        ends_window = count > 0 and count % MIN_MEASURED == 0
        before = self._full_windows if ends_window else self._full_windows - 1
        self.reading = read_batch(self.estimate, count, batch_rows, num_steps, calibration, before)
        if ends_window:
            self._full_windows = self._full_windows + 1 if self.reading.fill_low > 1 else 0

    def recalibrate(self, batch_rows: int, num_steps: float, calibration: float) -> None:
        """Read the batch again; windows so far were judged by another calibration, and count no more."""
        self._full_windows = 0
        self.judge(batch_rows, num_steps, calibration)

    def add(self, sample: StepSample, rows_seen: int, num_steps: float, calibration: float) -> None:
        """Take a sample in, ``rows_seen`` rows into the run, and judge."""
        self.history.add(sample.signal, sample.trace, rows_seen)
        self.estimate = self.history.estimate()
        self.judge(sample.num_rows, num_steps, calibration)

    def numbers(self, sample: StepSample, calibration: float) -> dict[str, float]:
        """The latest sample, the estimate and the reading, by the names they are logged under."""
        estimate, reading = self.estimate, self.reading
        assert estimate is not None
        return {
            "batch/rows": sample.num_rows,
            "batch/calibration": calibration,
            "gns/signal_sq": sample.signal,
            "gns/trace": sample.trace,
            "gns/n": self.history.num_measured,
            "gns/value": estimate.value,
            "gns/low": estimate.low,
            "gns/high": estimate.high,
            "gns/fill": reading.fill,
            "gns/efficiency": reading.efficiency,
        }

    def is_narrow(self, width: float) -> bool:
        """Whether the interval reaches at most ``width`` times the value to either side."""
        estimate = self.estimate
        return estimate is not None and estimate.conclusive and estimate.high - estimate.value <= width * estimate.value

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"history": self.history.state_dict(), "full_windows": self._full_windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.history.load_state_dict(state["history"])
        self._full_windows = state["full_windows"]
        if self.history.num_measured:
            self.estimate = self.history.estimate()
