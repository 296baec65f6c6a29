"""Is the batch of this run larger than its gradient needs?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch_state import GOOD_STEPS, MIN_MEASURED, MIN_STEPS, BatchReading, State, read_batch
from lightning_lora.errors import ConfigError
from lightning_lora.events import write_event
from lightning_lora.functional.noise_scale import NoiseScale
from lightning_lora.noise_history import NoiseHistory
from lightning_lora.step_meter import StepMeter
from lightning_lora.step_sample import StepSample

from .agreement import largest_of_ranks
from .pace import count_rows

_MIN_HALF_LIFE = 2000.0
_DENSE_STEPS = 50
_ADVICE: dict[State, str] = {
    "inconclusive": "the noise hides the signal so far: more steps, or more micro-batches a step, would show it.",
    "noise-limited": "larger batches would learn as much from every row, if the device has room.",
    "transition": "fill {fill:.2g}: neither clearly too large nor clearly small.",
    "signal-limited": "most of each row is averaged away: halve accumulate_grad_batches, or check it by a BatchProbe.",
    "step-starved": "{steps:.0f} steps are few whatever the noise: {fewer:.0f} rows a step make 100, aim at {good}.",
}


class BatchSizeMonitor(Callback):
    """Measures the gradient noise scale of what is trained, in rows, and says what it means for the batch.

    The micro-batches of gradient accumulation and of data parallelism are the samples: nothing is computed twice, and
    no random number drawn. A raw noise scale is telemetry, not a verdict: only a `BatchProbe` shows what a batch
    costs. Where it cannot measure (one micro-batch a step, FSDP1, DeepSpeed) it says so once and stays away; if it
    fails, training goes on without it.

    Args:
        every_n_steps: Optimizer steps from one measured step to the next, after the first 50, which all are.
        half_life: Fraction of an epoch after which a sample counts half; 2,000 rows at least.
        warmup_steps: Optimizer steps at the start that are left out: signals are large there, and mean little.
        calibration: Harmless batch over noise scale, from a probe; None if there was none, which counts as 1.

    Attributes:
        estimate: The latest `NoiseScale`, or None.
        state: ``"inconclusive"``, ``"noise-limited"``, ``"transition"``, ``"signal-limited"`` or ``"step-starved"``.
    """

    def __init__(
        self, every_n_steps: int = 10, half_life: float = 0.05, warmup_steps: int = 50, calibration: float | None = None
    ) -> None:
        if every_n_steps < 1 or warmup_steps < 0:
            raise ConfigError(
                f"every_n_steps must be 1 at least and warmup_steps 0, got {every_n_steps}, {warmup_steps}."
            )
        if not half_life > 0 or (calibration is not None and not 0 < calibration < math.inf):
            raise ConfigError(f"half_life and calibration must be positive, got {half_life} and {calibration}.")
        self.every_n_steps = every_n_steps
        self.half_life = half_life
        self.warmup_steps = warmup_steps
        self.calibration = calibration
        self.estimate: NoiseScale | None = None
        self.state: State = "inconclusive"
        self.reading: BatchReading | None = None
        self.batch_rows = 0
        self._meter: StepMeter | None = None
        self._history: NoiseHistory | None = None
        self._rows_seen = self._micro_rows = self._step_rows = self._full_windows = 0
        self._error: Exception | None = None
        self._folder = Path()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how this strategy can be measured."""
        self._meter = self._error = None
        # Reading log_dir is a collective: every rank must do it.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        try:
            self._meter = StepMeter(trainer, pl_module)
        except ConfigError as reason:
            rank_zero_warn(f"the batch-size monitor is off: {reason}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure where a step begins."""
        self._micro_rows = count_rows(batch)
        meter = self._meter
        if meter is not None and not meter.is_open and meter.can_start(batch_idx) and self._is_due(trainer.global_step):
            meter.start()
            self._step_rows = 0

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a micro-batch."""
        self._rows_seen += self._micro_rows * trainer.world_size
        if self._meter is None or not self._meter.is_open or self._error is not None:
            return
        try:
            self._meter.add(self._micro_rows)
        except Exception as error:
            self._error = error

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the sample of the step: gradients are unscaled here, and not yet clipped."""
        meter = self._meter
        if meter is None or not meter.is_open:
            return
        # A rank that failed takes no part in the reductions below, so all must know of it first.
        if largest_of_ranks(trainer, torch.tensor(int(self._error is not None))):
            meter.stop()
            self._meter = None
            reason = self._error or "it failed on another rank"
            rank_zero_warn(f"the batch-size monitor is off from step {trainer.global_step} on: {reason}")
            return
        samples = meter.finish()
        if (sample := samples.get("adapter")) is not None:
            self._judge(trainer, pl_module, sample)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was found, in two lines."""
        if self._meter is not None:
            rank_zero_info("\n".join(self.summary(trainer)))
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop()

    def restart(self) -> None:
        """Forget what was measured: the batch has changed, and the signal with it."""
        self._history, self.estimate, self.reading, self.state = None, None, None, "inconclusive"
        self._full_windows = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        history = None if self._history is None else self._history.state_dict()
        return {"history": history, "rows_seen": self._rows_seen, "full_windows": self._full_windows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        if state_dict["history"] is not None:
            self._history = NoiseHistory(1.0)
            self._history.load_state_dict(state_dict["history"])
        self._rows_seen, self._full_windows = state_dict["rows_seen"], state_dict["full_windows"]

    def summary(self, trainer: Trainer) -> tuple[str, str]:
        """What was found, in two lines: the state with the numbers behind it, and what it means for the batch."""
        reading, rows = self.reading, self.batch_rows
        steps = trainer.estimated_stepping_batches
        if reading is None or self.estimate is None:
            return f"batch size: {self.state}", "no step was measured: the run was too short."
        numbers = f"{rows} rows a step, {steps:.0f} steps, {len(self._history or ())} measured"
        if self.estimate.conclusive:
            low, high = self.estimate.low, self.estimate.high
            numbers += f", noise scale {self.estimate.value:.3g} rows ({low:.3g} to {high:.3g})"
        return f"batch size: {reading.state} ({numbers})", _ADVICE[reading.state].format(
            rows=rows, steps=steps, fewer=max(1, rows * steps // MIN_STEPS), fill=reading.fill, good=GOOD_STEPS
        )

    def _judge(self, trainer: Trainer, pl_module: LightningModule, sample: StepSample) -> None:
        if self._history is None:
            batches = trainer.num_training_batches
            epoch = batches * self._micro_rows * trainer.world_size if batches != math.inf else 0
            self._history = NoiseHistory(max(self.half_life * epoch, _MIN_HALF_LIFE))
        history = self._history
        history.add(sample, self._rows_seen)
        self.batch_rows = sample.num_rows
        self.estimate = history.estimate()
        steps = float(trainer.estimated_stepping_batches)
        reading = read_batch(
            self.estimate, len(history), sample.num_rows, steps, self.calibration or 1.0, self._full_windows
        )
        if len(history) % MIN_MEASURED == 0:
            self._full_windows = self._full_windows + 1 if reading.fill_low > 1 else 0
        self.reading, self.state = reading, reading.state
        self._log(trainer, pl_module, sample, steps)

    def _log(self, trainer: Trainer, pl_module: LightningModule, sample: StepSample, steps: float) -> None:
        assert self.estimate is not None
        assert self.reading is not None
        numbers = {
            "batch/rows": sample.num_rows,
            "batch/steps_total": steps,
            "gns/signal_sq": sample.signal,
            "gns/trace": sample.trace,
            "gns/value": self.estimate.value,
            "gns/low": self.estimate.low,
            "gns/high": self.estimate.high,
            "gns/fill": self.reading.fill,
            "gns/efficiency": self.reading.efficiency,
        }
        for logger in trainer.loggers:
            logger.log_metrics(
                {name: value for name, value in numbers.items() if math.isfinite(value)}, trainer.global_step
            )
        if trainer.is_global_zero:
            event = {"event": "noise_scale", "step": trainer.global_step, "rows_seen": self._rows_seen}
            write_event(self._folder, event | numbers | {"state": self.state})

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
            self._meter = None

    def _is_due(self, step: int) -> bool:
        past = step - self.warmup_steps
        return past >= 0 and (past < _DENSE_STEPS or past % self.every_n_steps == 0)
