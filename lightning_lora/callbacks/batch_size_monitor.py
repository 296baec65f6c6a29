"""Measures whether the batch of a run is larger than its gradient needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch.calibration import known_calibration
from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.batch.history import MIN_HALF_LIFE, OtherMetrics
from lightning_lora.batch.judge import BatchJudge
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.batch.noise.step_meter import StepMeter
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.reading import BatchReading, BatchState, advice
from lightning_lora.batch.remarks import RepeatedRows, announce_batch, warn_of_stored_order
from lightning_lora.batch.run_events import RunEvents
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_size, loader_batch_size
from lightning_lora.errors import ConfigError, MeasurementError, check_arguments
from lightning_lora.sharding.collectives import largest_of_ranks, total_of_ranks

PLOT = "batch_size.png"
# All of the first steps are measured, and further ones until the interval is narrow enough or patience ends.
_DENSE_STEPS, _PATIENCE_STEPS, _INTERVAL_WIDTH = 50, 500, 0.25


class BatchSizeMonitor(Callback):
    """Measures the gradient noise scale of the trained parameters, in rows, and says what it means for the batch.

    Samples are the micro-batches of gradient accumulation and data parallelism, or the rows of a micro-batch where a
    step has only one. Nothing is computed twice and no random number is drawn. A raw noise scale is telemetry, not a
    verdict: only a `BatchProbe` shows what a batch costs. Where steps cannot be measured (FSDP1, DeepSpeed, rows of
    layers that are not linear) one warning says so, and the batch and the number of steps are still reported. If the
    monitor fails, training goes on without it.

    Loggers get ``batch/*`` and ``gns/*``. The run folder gets ``events.jsonl`` and, at the end, ``batch_size.png``;
    without a logger and a ``default_root_dir`` there is no run folder, and neither is written.

    Args:
        every_n_steps: Optimizer steps from one measured step to the next. The first 50 steps after the warm-up are all
            measured, and up to 500 while the interval is wider than a quarter of the value to either side.
        calibration: Harmless batch over noise scale, or the path of a ``batch_probe.json`` that holds it. None, without
            a probe, counts as 1.

    Attributes:
        batch: The `EffectiveBatch` of the run; None before its first batch.
        warmup_steps: Optimizer steps at the start that are not measured: signals are large there, and mean little.
        half_life: Fraction of an epoch after which a sample counts half; at least 2,000 rows and 25 samples.
        measures_adam: Whether the noise scale is measured as Adam scales the gradient too (``gns/adam``).
        frozen_weights_every: Optimizer steps from one measurement of the frozen weights' noise scale to the next
            (``gns/weight``, and ``gns/lambda``, its ratio to that of the adapters); 0 never measures it.
    """

    # Constants that a subclass or a test may replace.
    warmup_steps: int = 50
    half_life: float = 0.05
    measures_adam: bool = False
    frozen_weights_every: int = 0

    def __init__(self, every_n_steps: int = 10, calibration: float | str | None = None) -> None:
        check_arguments(BatchSizeMonitor, locals(), MeasurementError)
        if isinstance(calibration, str):
            calibration = known_calibration(calibration)
        if every_n_steps < 1:
            raise MeasurementError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        if calibration is not None:
            _check_calibration(calibration)
        self.every_n_steps = every_n_steps
        self.calibration: float | None = calibration
        self.batch: EffectiveBatch | None = None
        self._judge = BatchJudge()
        self._other_metrics = OtherMetrics()
        self._rows_seen = 0
        self._meter: StepMeter | None = None
        self._error: Exception | None = None

    @property
    def estimate(self) -> NoiseScale | None:
        """The latest noise scale; None before the first sample."""
        return self._judge.estimate

    @property
    def reading(self) -> BatchReading:
        """The state of the batch and the numbers behind it."""
        return self._judge.reading

    @property
    def state(self) -> BatchState:
        """``"inconclusive"``, ``"noise-limited"``, ``"transition"``, ``"signal-limited"`` or ``"step-starved"``."""
        return self.reading.state

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose how steps of this run are measured."""
        self._meter, self._error, self.batch = None, None, None
        self._reason_off = "the run was too short"
        self._events, self._repeated = RunEvents(trainer, "BatchSizeMonitor"), RepeatedRows()
        self._has_alarmed = False
        try:
            self._meter = StepMeter(trainer, pl_module, self.measures_adam, self.frozen_weights_every)
        except ConfigError as reason:
            self._turn_off(str(reason))
            return
        warn_of_stored_order(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to measure where a step begins, and count rows and tokens."""
        meter, self._micro_rows = self._meter, count_rows(batch)
        with self._harmless():
            if self.batch is None or self.batch.accumulation != trainer.accumulate_grad_batches:
                self._follow_batch(trainer, batch)
            assert self.batch is not None
            self._rows_seen += self._micro_rows * self.batch.num_ranks
            if meter is None:
                return
            if not meter.is_open and meter.can_start(batch_idx) and self._is_due(trainer.global_step):
                meter.start()
                self._repeated.start()
                self._tokens: Tensor | int | None = None
            if meter.is_open:
                self._repeated.add(batch)
                if (tokens := count_supervised(batch)) is not None:
                    self._tokens = tokens if self._tokens is None else self._tokens + tokens

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a micro-batch."""
        meter = self._meter
        if meter is not None and meter.is_open and self._error is None:
            with self._harmless():
                meter.add(self._micro_rows)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the sample of the step: gradients are unscaled by now, and not yet clipped."""
        meter = self._meter
        if meter is None or not meter.is_open:
            return
        # A rank that failed takes no part in the reductions below, so all ranks must know of it first.
        if not self._failed_on_any_rank(trainer):
            with self._harmless():
                samples = meter.finish()
                self._repeated.finish()
                tokens = self._tokens
                if tokens is not None:
                    tokens = int(total_of_ranks(trainer, torch.as_tensor(tokens)))
                self._other_metrics.add(samples, self._rows_seen, self._judge.history.half_life)
                if (sample := samples.get("adapter")) is not None:
                    self._take(trainer, sample, tokens)
        if self._failed_on_any_rank(trainer):
            self._turn_off(f"it failed at step {trainer.global_step}: {self._error or 'on another rank'}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the result in two lines, and draw it."""
        rank_zero_info("\n".join(self.summary(trainer)))
        if self._events.folder is not None and self.estimate is not None:
            with self._harmless():
                from lightning_lora.batch.plot import plot_noise_scale  # matplotlib, which most imports do not need

                plot_noise_scale(self._events.folder, self._events.folder / PLOT)
        self._repeated.warn()
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks."""
        self._stop()

    def restart(self) -> None:
        """Forget all samples, because the batch has changed."""
        self._judge.restart()
        self._other_metrics.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The samples so far."""
        others = self._other_metrics.state_dict()
        return {"judge": self._judge.state_dict(), "spaces": others, "rows_seen": self._rows_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the samples of an interrupted run."""
        self._judge.load_state_dict(state_dict["judge"])
        self._other_metrics.load_state_dict(state_dict["spaces"])
        self._rows_seen = state_dict["rows_seen"]

    def calibrate(self, trainer: Trainer, calibration: float) -> None:
        """Use the calibration that a probe has found, from now on.

        Args:
            trainer: The Trainer of the run.
            calibration: Harmless batch over noise scale.

        Raises:
            ConfigError: If it is no positive number.
        """
        _check_calibration(calibration)
        self.calibration = calibration
        if self.batch is not None:
            self._judge.recalibrate(self.batch.rows, _num_steps(trainer), calibration)

    def summary(self, trainer: Trainer) -> tuple[str, str]:
        """The result in two lines: the state with the numbers behind it, and what it means for the batch."""
        if self.batch is None:
            return f"batch size: {self.state}", "the run had no batch."
        steps, estimate, measured = _num_steps(trainer), self.estimate, self._judge.history.num_measured
        numbers = f"{self.batch}, {steps:.0f} steps, {measured} measured"
        if estimate is not None and estimate.conclusive:
            numbers += f", noise scale {estimate.value:.3g} rows ({estimate.low:.3g} to {estimate.high:.3g})"
        is_unmeasured = not measured and self.state == "inconclusive"
        meaning = f"nothing was measured: {self._reason_off}" if is_unmeasured else self._advice(steps)
        return f"batch size: {self.state} ({numbers})", meaning

    def _follow_batch(self, trainer: Trainer, batch: Any) -> None:
        """Report the batch before the first step, and again when accumulation has changed it."""
        ranks = data_parallel_size(trainer)
        if self.batch is not None:
            self.restart()
        rows = self._micro_rows
        if trainer.is_last_batch and not (isinstance(batch, Mapping) and "position_ids" in batch):
            # A resumed run may begin with the last batch of an epoch, which is shorter. Packed rows are fewer anyway.
            rows = max(rows, loader_batch_size(trainer.train_dataloader) or 0)
        self.batch = EffectiveBatch(rows, trainer.accumulate_grad_batches, ranks)
        batches, steps = float(trainer.num_training_batches), _num_steps(trainer)
        epoch = batches * rows * ranks if math.isfinite(batches) else 0.0
        self._judge.history.half_life = max(self.half_life * epoch, MIN_HALF_LIFE)
        self._judge.judge(self.batch.rows, steps, self.calibration or 1.0)
        announce_batch(self.batch, self.reading, steps, batch)
        numbers = {"batch/k": self.batch.accumulation, "batch/rows": self.batch.rows, "batch/steps_total": steps}
        self._events.write("batch", trainer.global_step, numbers)

    def _take(self, trainer: Trainer, sample: StepSample, tokens: int | None) -> None:
        """Judge by a sample, and log it."""
        assert self.batch is not None
        judge, steps, calibration, rows = self._judge, _num_steps(trainer), self.calibration or 1.0, self.batch.rows
        judge.add(sample, rows, self._rows_seen, steps, calibration)
        numbers = {"batch/k": trainer.accumulate_grad_batches, "batch/rows": rows, "batch/steps_total": steps}
        numbers |= judge.numbers(sample, calibration) | self._other_metrics.numbers(judge.estimate)
        if tokens is not None:
            numbers["batch/tokens"] = tokens
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, trainer.global_step)
        event = {"rows_seen": self._rows_seen, **numbers, "state": self.state}
        self._events.write("noise_scale", trainer.global_step, event)
        if self.state == "signal-limited" and not self._has_alarmed:
            self._has_alarmed = True
            rank_zero_warn(f"signal-limited: {self._advice(steps)}")

    def _advice(self, steps: float) -> str:
        assert self.batch is not None
        return advice(self.reading, self.batch, steps)

    def _failed_on_any_rank(self, trainer: Trainer) -> bool:
        return bool(largest_of_ranks(trainer, torch.tensor(int(self._error is not None))))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Keep an error of the monitor from ending the run."""
        try:
            yield
        except Exception as error:
            self._error = error

    def _turn_off(self, reason: str) -> None:
        self._stop()
        self._reason_off = reason.rstrip(".")
        rank_zero_warn(f"the batch-size monitor measures nothing: {reason}")

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
            self._meter = None

    def _is_due(self, step: int) -> bool:
        past = step - self.warmup_steps
        if past < 0:
            return False
        is_dense = past < _DENSE_STEPS or (past < _PATIENCE_STEPS and not self._judge.is_precise(_INTERVAL_WIDTH))
        return is_dense or past % self.every_n_steps == 0


def _num_steps(trainer: Trainer) -> float:
    return float(trainer.estimated_stepping_batches)


def _check_calibration(calibration: float) -> None:
    if not isinstance(calibration, (int, float)) or not 0 < calibration < math.inf:
        raise MeasurementError(f"calibration must be a positive number, got {calibration}.")
