"""The reading of a run's batch, updated as samples of its noise scale arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.batch.history import NoiseHistory
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.reading import MIN_MEASURED, read_batch


class BatchJudge:
    """Keeps the latest estimate of the noise scale and the reading of the batch.

    Attributes:
        estimate: The noise scale, rows; None before the first sample.
    """

    def __init__(self) -> None:
        self.history = NoiseHistory()
        self.restart()

    def restart(self) -> None:
        """Forget all samples, because the batch has changed."""
        self.history.clear()
        self.estimate: NoiseScale | None = None
        self.reading = read_batch(None, 0, 0, float("inf"))
        # Windows of MIN_MEASURED samples in a row whose fill was above 1 with certainty.
        self._full_windows = 0

    def judge(self, batch_rows: int, num_steps: float, calibration: float) -> None:
        """Read the batch from the present samples.

        Args:
            batch_rows: Rows per optimizer step.
            num_steps: Optimizer steps of the whole run.
            calibration: Harmless batch over noise scale.
        """
        count = self.history.num_measured
        # Within a window a run may stop being "signal-limited", but only the end of a window can make it so.
        ends_window = count > 0 and count % MIN_MEASURED == 0
        before = self._full_windows if ends_window else self._full_windows - 1
        self.reading = read_batch(self.estimate, count, batch_rows, num_steps, calibration, before)
        if ends_window:
            self._full_windows = self._full_windows + 1 if self.reading.fill_low > 1 else 0

    def recalibrate(self, batch_rows: int, num_steps: float, calibration: float) -> None:
        """Read the batch again. Counting of windows restarts: earlier ones were judged with another calibration."""
        self._full_windows = 0
        self.judge(batch_rows, num_steps, calibration)

    def add(self, sample: StepSample, batch_rows: int, rows_seen: int, num_steps: float, calibration: float) -> None:
        """Add a sample, taken ``rows_seen`` rows into the run, and read the batch.

        ``batch_rows`` are those of a whole step: the last step of an epoch may have fewer, which says nothing of the
        batch.
        """
        self.history.add(sample, rows_seen)
        self.estimate = self.history.estimate()
        self.judge(batch_rows, num_steps, calibration)

    def numbers(self, sample: StepSample, calibration: float) -> dict[str, float]:
        """The latest sample, the estimate and the reading, by their logged names."""
        estimate, reading = self.estimate, self.reading
        assert estimate is not None
        return {
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

    def is_precise(self, width: float) -> bool:
        """Whether the interval reaches at most ``width`` times the value to either side."""
        estimate = self.estimate
        return estimate is not None and estimate.conclusive and estimate.high - estimate.value <= width * estimate.value

    def state_dict(self) -> dict[str, Any]:
        """The samples and the count of windows, in plain types."""
        return {"history": self.history.state_dict(), "full_windows": self._full_windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.history.load_state_dict(state["history"])
        self._full_windows = state["full_windows"]
        if self.history.num_measured:
            self.estimate = self.history.estimate()
