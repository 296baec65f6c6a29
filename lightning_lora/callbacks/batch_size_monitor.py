"""Is the batch of this run larger than its gradient needs?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch.calibration import known_calibration
from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.batch.history import NoiseSpaces
from lightning_lora.batch.judge import MIN_HALF_LIFE, BatchJudge
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.batch.noise.step_meter import StepMeter
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.remarks import RepeatedRows, announce_batch, is_in_order, is_packed
from lightning_lora.batch.state import BatchReading, State, advice
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_size
from lightning_lora.errors import ConfigError
from lightning_lora.files.events import write_event
from lightning_lora.sharding.collectives import largest_of_ranks, total_of_ranks

PLOT = "batch_size.png"
# Every step is measured at first, and on until the interval is this narrow or patience ends.
_DENSE_STEPS, _PATIENCE_STEPS, _NARROW = 50, 500, 0.25


class BatchSizeMonitor(Callback):
    """Measures the gradient noise scale of what is trained, in rows, and says what it means for the batch.

    The micro-batches of gradient accumulation and of data parallelism are the samples, or the rows of a micro-batch
    where a step has a single one: nothing is computed twice, and no random number drawn. A raw noise scale is
    telemetry, not a verdict: only a `BatchProbe` shows what a batch costs. Where it cannot measure (FSDP1, DeepSpeed,
    rows of layers that are not linear) it says so once and still tells the batch and the number of steps; if it fails,
    training goes on without it.

    Loggers get ``batch/*`` and ``gns/*``, the run folder ``events.jsonl`` and, at the end, ``batch_size.png``.

    Args:
        every_n_steps: Optimizer steps from one measured step to the next, after the first 50, which all are; these go
            on, for 500 steps at most, while the interval is wider than a quarter of the value to either side.
        half_life: Fraction of an epoch after which a sample counts half; 2,000 rows and 25 samples at least.
        warmup_steps: Optimizer steps at the start that are left out: signals are large there, and mean little.
        calibration: Harmless batch over noise scale, or the ``batch_probe.json`` of a probe that found it; None if
            there was none, which counts as 1.
        spaces: ``"adapter"``, and ``"adam"`` for the noise scale as Adam's second moment scales the gradient too.
        weight_space_every: Optimizer steps from one measurement of the frozen weights' noise scale to the next (500,
            say), and of ``lambda``, what it is of the adapters'; 0: none.

    Attributes:
        batch: The `EffectiveBatch` of the run; None before its first batch.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        half_life: float = 0.05,
        warmup_steps: int = 50,
        calibration: float | str | None = None,
        spaces: Sequence[Literal["adapter", "adam"]] = ("adapter",),
        weight_space_every: int = 0,
    ) -> None:
        if isinstance(calibration, str):
            calibration = known_calibration(calibration)
        if every_n_steps < 1 or warmup_steps < 0:
            raise ConfigError(
                f"every_n_steps must be 1 at least and warmup_steps 0, got {every_n_steps}, {warmup_steps}."
            )
        if not half_life > 0 or (calibration is not None and not 0 < calibration < math.inf):
            raise ConfigError(f"half_life and calibration must be positive, got {half_life} and {calibration}.")
        if not set(spaces) <= {"adapter", "adam"} or weight_space_every < 0:
            raise ConfigError(
                f'spaces are "adapter" and "adam" and weight_space_every is 0 at least, got {list(spaces)} and '
                f"{weight_space_every}."
            )
        self.every_n_steps = every_n_steps
        self.half_life = half_life
        self.warmup_steps = warmup_steps
        self.calibration: float | None = calibration
        self.spaces = tuple(spaces)
        self.weight_space_every = weight_space_every
        self.batch: EffectiveBatch | None = None
        self._judge = BatchJudge()
        self._spaces = NoiseSpaces()
        self._meter: StepMeter | None = None
        self._off = ""
        self._error: Exception | None = None
        self._rows_seen = self._micro_rows = 0
        self._tokens: Tensor | None = None
        self._repeated = RepeatedRows()
        self._is_alarmed = False
        self._folder = Path()

    @classmethod
    def of(cls, trainer: Trainer) -> BatchSizeMonitor | None:
        """The one among the callbacks of ``trainer``, or None."""
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    @property
    def estimate(self) -> NoiseScale | None:
        """The latest noise scale; None before the first sample."""
        return self._judge.estimate

    @property
    def reading(self) -> BatchReading:
        """The state and the numbers behind it."""
        return self._judge.reading

    @property
    def state(self) -> State:
        """``"inconclusive"``, ``"noise-limited"``, ``"transition"``, ``"signal-limited"`` or ``"step-starved"``."""
        return self.reading.state

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how this strategy can be measured."""
        self._meter, self._off, self._error, self.batch = None, "", None, None
        self._repeated, self._is_alarmed = RepeatedRows(), False
        # Reading log_dir is a collective: every rank must do it.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        try:
            self._meter = StepMeter(trainer, pl_module, self.spaces, self.weight_space_every)
        except ConfigError as reason:
            self._turn_off(str(reason))
            return
        if is_in_order(trainer):
            rank_zero_warn(
                "training rows come in the order they are stored in: where neighbours are alike, the batch-size "
                "monitor finds too much noise; set shuffle=True."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure where a step begins."""
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
                self._tokens = None
            if meter.is_open:
                self._repeated.add(batch)
                if (tokens := count_supervised(batch)) is not None:
                    self._tokens = tokens if self._tokens is None else self._tokens + tokens

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a micro-batch."""
        meter = self._meter
        if meter is not None and meter.is_open and self._error is None:
            with self._harmless():
                meter.add(self._micro_rows)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the sample of the step: gradients are unscaled here, and not yet clipped."""
        meter = self._meter
        if meter is None or not meter.is_open:
            return
        # A rank that failed takes no part in the reductions below, so all must know of it first.
        if not self._failed_somewhere(trainer):
            with self._harmless():
                samples = meter.finish()
                tokens = None if self._tokens is None else int(total_of_ranks(trainer, self._tokens))
                self._spaces.add(samples, self._rows_seen, self._judge.history.half_life)
                if (sample := samples.get("adapter")) is not None:
                    self._take(trainer, sample, tokens)
        if self._failed_somewhere(trainer):
            self._turn_off(f"it failed at step {trainer.global_step}: {self._error or 'on another rank'}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was found, in two lines, and draw it."""
        rank_zero_info("\n".join(self.summary(trainer)))
        if trainer.is_global_zero and self.estimate is not None:
            with self._harmless():
                from lightning_lora.batch.plot import plot_noise_scale  # matplotlib, which most imports do not need

                plot_noise_scale(self._folder, self._folder / PLOT)
        if (repeated := self._repeated.finding()) is not None:
            rank_zero_warn(repeated)
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop()

    def restart(self) -> None:
        """Forget what was measured: the batch has changed, and the signal with it."""
        self._judge.restart()
        self._spaces.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        spaces = self._spaces.state_dict()
        return {"judge": self._judge.state_dict(), "spaces": spaces, "rows_seen": self._rows_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._judge.load_state_dict(state_dict["judge"])
        self._spaces.load_state_dict(state_dict["spaces"], self._judge.history.half_life)
        self._rows_seen = state_dict["rows_seen"]

    def calibrate(self, trainer: Trainer, calibration: float) -> None:
        """Judge by what a probe has found, from now on.

        Args:
            trainer: Of the run.
            calibration: Harmless batch over noise scale.
        """
        self.calibration = calibration
        if self.batch is not None:
            self._judge.recalibrate(self.batch.rows, _num_steps(trainer), calibration)

    def summary(self, trainer: Trainer) -> tuple[str, str]:
        """What was found, in two lines: the state with the numbers behind it, and what it means for the batch."""
        if self.batch is None:
            return f"batch size: {self.state}", "no batch was seen."
        steps, estimate, measured = _num_steps(trainer), self.estimate, self._judge.history.num_measured
        numbers = f"{self.batch}, {steps:.0f} steps, {measured} measured"
        if estimate is not None and estimate.conclusive:
            numbers += f", noise scale {estimate.value:.3g} rows ({estimate.low:.3g} to {estimate.high:.3g})"
        unmeasured = "" if measured else f"nothing was measured: {self._off or 'the run was too short'}"
        told = unmeasured if unmeasured and self.state == "inconclusive" else self._advice(steps)
        return f"batch size: {self.state} ({numbers})", told

    def _follow_batch(self, trainer: Trainer, batch: Any) -> None:
        """Tell what a step takes, when that is known and when accumulation changes it."""
        ranks = data_parallel_size(trainer)
        if self.batch is not None:
            self.restart()
        self.batch = EffectiveBatch(self._micro_rows, trainer.accumulate_grad_batches, ranks)
        batches, steps = float(trainer.num_training_batches), _num_steps(trainer)
        epoch = batches * self._micro_rows * ranks if math.isfinite(batches) else 0.0
        self._judge.history.half_life = max(self.half_life * epoch, MIN_HALF_LIFE)
        self._judge.judge(self.batch.rows, steps, self.calibration or 1.0)
        announce_batch(self.batch, self.reading, steps, is_packed(batch))
        if trainer.is_global_zero:
            event = {"event": "batch", "step": trainer.global_step, "batch/k": self.batch.accumulation}
            write_event(self._folder, event | {"batch/rows": self.batch.rows, "batch/steps_total": steps})

    def _take(self, trainer: Trainer, sample: StepSample, tokens: int | None) -> None:
        """Judge by a sample, and log it."""
        judge, steps, calibration = self._judge, _num_steps(trainer), self.calibration or 1.0
        judge.add(sample, self._rows_seen, steps, calibration)
        numbers = {"batch/k": trainer.accumulate_grad_batches, "batch/steps_total": steps}
        numbers |= judge.numbers(sample, calibration) | self._spaces.numbers(judge.estimate)
        if tokens is not None:
            numbers["batch/tokens"] = tokens
        for logger in trainer.loggers:
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            logger.log_metrics(finite, trainer.global_step)
        if trainer.is_global_zero:
            event = {"event": "noise_scale", "step": trainer.global_step, "rows_seen": self._rows_seen}
            write_event(self._folder, event | numbers | {"state": self.state})
        if self.state == "signal-limited" and not self._is_alarmed:
            self._is_alarmed = True
            rank_zero_warn(f"signal-limited: {self._advice(steps)}")

    def _advice(self, steps: float) -> str:
        assert self.batch is not None
        return advice(self.reading, self.batch, steps)

    def _failed_somewhere(self, trainer: Trainer) -> bool:
        return bool(largest_of_ranks(trainer, torch.tensor(int(self._error is not None))))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """The run must not end because its monitor does."""
        try:
            yield
        except Exception as error:
            self._error = error

    def _turn_off(self, reason: str) -> None:
        self._stop()
        self._off = reason.rstrip(".")
        rank_zero_warn(f"the batch-size monitor measures nothing: {reason}")

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
            self._meter = None

    def _is_due(self, step: int) -> bool:
        past = step - self.warmup_steps
        if past < 0:
            return False
        is_dense = past < _DENSE_STEPS or (past < _PATIENCE_STEPS and not self._judge.is_narrow(_NARROW))
        return is_dense or past % self.every_n_steps == 0


def _num_steps(trainer: Trainer) -> float:
    return float(trainer.estimated_stepping_batches)
