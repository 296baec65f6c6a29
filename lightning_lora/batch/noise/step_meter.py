"""Measures single optimizer steps of a Trainer, under any supported strategy, without changing the module."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.batch.noise.adam_metric import AdamMetric
from lightning_lora.batch.noise.frozen_weights import WeightSketches
from lightning_lora.batch.noise.sample_source import sample_source, weight_source
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.errors import ConfigError, MeasurementError
from lightning_lora.sharding import FSDP2Strategy


class StepMeter:
    """Follows the micro-batches of measured steps. Optional metrics that cannot be measured are dropped with a warning.

    Args:
        measures_adam: Measure the gradient as Adam scales it too (`AdamMetric`).
        frozen_weights_every: Optimizer steps from one measurement of the frozen weights to the next; 0 never measures.

    Raises:
        ConfigError: If steps of this run cannot be measured; the message says what to change.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        measures_adam: bool = False,
        frozen_weights_every: int = 0,
    ) -> None:
        if len(trainer.optimizers) != 1:
            raise MeasurementError(
                f"gradients of a step are known for one optimizer only, and the module has {len(trainer.optimizers)}."
            )
        self.trainer, self.module = trainer, module
        self.frozen_weights_every = frozen_weights_every
        self._metric = self._adam_metric() if measures_adam else None
        self.source = sample_source(trainer, module, {} if self._metric is None else {"adam": self._metric})
        self.weights = self._weight_source() if frozen_weights_every else None
        self.is_open = self._has_warned = False
        self._measures_weights = False
        self._last_weights: int | None = None
        # What is changed while a step is measured, and restored after it.
        self._changed = ExitStack()
        # The batch that each backward pass of the step belongs to.
        self._batches: list[int] = []

    @property
    def num_ranks(self) -> int:
        """Number of data-parallel ranks."""
        return self.source.num_ranks

    def can_start(self, batch_idx: int) -> bool:
        """Whether a step begins with this batch."""
        return not self.module.automatic_optimization or batch_idx % self.trainer.accumulate_grad_batches == 0

    def start(self) -> None:
        """Begin to measure a step, before its first forward pass."""
        if self._metric is not None:
            self._start_metric(self._metric)
        self.source.start()
        self.is_open, self._batches = True, []
        step, last = self.trainer.global_step, self._last_weights
        self._measures_weights = last is None or step - last >= self.frozen_weights_every
        if self.weights is not None and self._measures_weights:
            self.weights.start(step)
            self._last_weights = step
        # Deferred gradients are not reduced, and so not seen, until the last micro-batch.
        if isinstance(strategy := self.trainer.strategy, FSDP2Strategy):
            self._changed.enter_context(strategy.communicating_gradients())

    def add(self, num_rows: int) -> None:
        """Measure ``num_rows`` rows after their backward pass; with manual optimization, each pass over a batch."""
        if not num_rows:
            raise MeasurementError("the batch holds no tensor whose rows could be counted.")
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._batches.append(self.trainer.fit_loop.total_batch_idx)
        self.source.add(num_rows, scale)
        if self.weights is not None and self._measures_weights:
            self.weights.add(num_rows, scale)

    def finish(self) -> dict[str, StepSample]:
        """The samples of the step by metric: ``"adapter"``, and ``"adam"`` and ``"weight"`` where they are measured.

        Call it after gradients are unscaled and before they are clipped. A step of a single sample gives none.
        """
        self._close()
        if not self.module.automatic_optimization:
            passes = Counter(self._batches)
            self.source.share_rows([passes[batch] for batch in self._batches])
        is_sum, mean_factor = isinstance(self.module, TokenWeightedLoss), self._mean_factor()
        samples = self.source.finish(is_sum)
        if not self.module.automatic_optimization and self.source.num_added * self.num_ranks < 2:
            self._warn_once()
        if self.weights is not None and self._measures_weights:
            try:
                sample = self.weights.finish(is_sum)
                samples |= {} if sample is None else {"weight": sample}
            except Exception as reason:
                self.weights = None
                rank_zero_warn(f"the noise scale of the frozen weights is no longer measured: {reason}")
        # Without a finite gradient of the adapters the other metrics mean nothing.
        if "adapter" not in samples:
            return {}
        return {metric: sample.scaled(mean_factor) for metric, sample in samples.items()}

    def stop(self) -> None:
        """Give up the measurement of this step."""
        self._close()
        self.source.stop()
        if self.weights is not None:
            self.weights.stop()

    def _close(self) -> None:
        self._changed.close()
        self.is_open = False

    def _mean_factor(self) -> float:
        """The factor that makes the gradient of the step a mean over its rows or tokens, equal on all ranks."""
        if isinstance(self.module, TokenWeightedLoss):
            return self.module.gradient_factor()
        # Lightning divides by accumulate_grad_batches even in a shorter last window.
        asked = self.trainer.accumulate_grad_batches if self.module.automatic_optimization else self.source.num_added
        return asked / self.source.num_added

    def _warn_once(self) -> None:
        if not self._has_warned:
            rank_zero_warn(
                "the batch-size monitor sees one backward pass in a step of manual optimization and has nothing to "
                "compare it with: call self.manual_backward for each half of the batch."
            )
        self._has_warned = True

    def _adam_metric(self) -> AdamMetric | None:
        try:
            return AdamMetric(self.trainer.optimizers[0])
        except ConfigError as reason:
            rank_zero_warn(f"the noise scale is not measured as Adam scales it: {reason}")
            return None

    def _start_metric(self, metric: AdamMetric) -> None:
        try:
            metric.start()
        except ConfigError as reason:
            self._metric = None
            del self.source.metrics["adam"]
            rank_zero_warn(f"the noise scale is not measured as Adam scales it: {reason}")

    def _weight_source(self) -> WeightSketches | None:
        try:
            return weight_source(self.trainer, self.module)
        except ConfigError as reason:
            rank_zero_warn(f"the noise scale of the frozen weights is not measured: {reason}")
            return None
