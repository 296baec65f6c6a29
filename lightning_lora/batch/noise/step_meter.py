"""Samples of the noise scale from the steps of a Trainer, on whatever strategy, without touching the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.batch.noise.adam_metric import OptimizerMetric
from lightning_lora.batch.noise.frozen_weights import WeightSketches
from lightning_lora.batch.noise.sample_source import sample_source, weight_source
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.errors import ConfigError
from lightning_lora.sharding import FSDP2Strategy


class StepMeter:
    """Follows the micro-batches of measured steps.

    What is measured beside the adapter gradient is given up with a warning where it is not to be had.

    Args:
        trainer: With its optimizers.
        module: The module it trains.
        spaces: ``"adapter"``, and ``"adam"`` for the measure of `OptimizerMetric` too.
        weight_space_every: Optimizer steps from one measurement of the frozen weights to the next; 0: none.

    Raises:
        ConfigError: If this strategy or setting leaves nothing to measure, saying what would.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        spaces: Sequence[str] = ("adapter",),
        weight_space_every: int = 0,
    ) -> None:
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"one optimizer is needed to know what belongs to a step, there are {len(trainer.optimizers)}."
            )
        self.trainer, self.module = trainer, module
        self.weight_space_every = weight_space_every
        self._metric = self._adam() if "adam" in spaces else None
        self.source = sample_source(trainer, module, {} if self._metric is None else {"adam": self._metric})
        self.weights = self._sketches() if weight_space_every else None
        self.is_open = self._has_warned = False
        self._measures_weights = False
        self._last_weights: int | None = None
        self._defer_gradients: bool | None = None
        # The batch that each backward pass of the step belongs to.
        self._batches: list[int] = []

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.source.num_ranks

    def can_start(self, batch_idx: int) -> bool:
        """Whether a step begins with this batch."""
        return not self.module.automatic_optimization or batch_idx % self.trainer.accumulate_grad_batches == 0

    def start(self) -> None:
        """Measure the step that begins."""
        if self._metric is not None:
            self._look_at_state(self._metric)
        self.source.start()
        self.is_open, self._batches = True, []
        step, last = self.trainer.global_step, self._last_weights
        self._measures_weights = last is None or step - last >= self.weight_space_every
        if self.weights is not None and self._measures_weights:
            self.weights.start(step)
            self._last_weights = step
        # There is nothing to see of gradients that stay where they are until the last micro-batch.
        if isinstance(strategy := self.trainer.strategy, FSDP2Strategy):
            self._defer_gradients, strategy.defer_gradients = strategy.defer_gradients, False

    def add(self, num_rows: int) -> None:
        """Note a micro-batch after its backward pass; of several passes over parts of a batch, each."""
        if not num_rows:
            raise ConfigError("the batch holds no tensor to count rows by.")
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._batches.append(self.trainer.fit_loop.total_batch_idx)
        self.source.add(num_rows, scale)
        if self.weights is not None and self._measures_weights:
            self.weights.add(num_rows, scale)

    def finish(self) -> dict[str, StepSample]:
        """The samples of the step by space: ``"adapter"``, and ``"adam"`` and ``"weight"`` where they are measured.

        Gradients are unscaled then, not yet clipped. Without two micro-batches there are no samples.
        """
        self._close()
        if not self.module.automatic_optimization:
            passes = Counter(self._batches)
            self.source.share_rows([passes[batch] for batch in self._batches])
        is_sum, unit = isinstance(self.module, TokenWeightedLoss), self._unit()
        samples = self.source.finish(is_sum, unit)
        if not self.module.automatic_optimization and self.source.num_added * self.num_ranks < 2:
            self._warn_once()
        if self.weights is not None and self._measures_weights:
            try:
                sample = self.weights.finish(is_sum, unit)
                samples |= {} if sample is None else {"weight": sample}
            except Exception as reason:
                self.weights = None
                rank_zero_warn(f"the noise scale of the frozen weights is not measured from here on: {reason}")
        # A gradient that is not finite says nothing in any space.
        return samples if "adapter" in samples else {}

    def stop(self) -> None:
        """Measure no more of this step."""
        self._close()
        self.source.stop()
        if self.weights is not None:
            self.weights.stop()

    def _close(self) -> None:
        if self.is_open and isinstance(strategy := self.trainer.strategy, FSDP2Strategy):
            strategy.defer_gradients = self._defer_gradients
        self.is_open = False

    def _unit(self) -> float:
        if isinstance(self.module, TokenWeightedLoss):
            return self.module.gradient_factor()
        # Lightning divides by the accumulation that was asked for, also in a short last window.
        asked = self.trainer.accumulate_grad_batches if self.module.automatic_optimization else self.source.num_added
        return asked / self.source.num_added

    def _warn_once(self) -> None:
        if not self._has_warned:
            rank_zero_warn(
                "the batch-size monitor sees one backward pass in a step of manual optimisation, which has nothing to "
                "compare: call self.manual_backward for each half of the batch."
            )
        self._has_warned = True

    def _adam(self) -> OptimizerMetric | None:
        try:
            return OptimizerMetric(self.trainer.optimizers[0])
        except ConfigError as reason:
            rank_zero_warn(f"the noise scale is not measured as Adam scales it: {reason}")
            return None

    def _look_at_state(self, metric: OptimizerMetric) -> None:
        try:
            metric.start()
        except ConfigError as reason:
            self._metric = None
            del self.source.metrics["adam"]
            rank_zero_warn(f"the noise scale is not measured as Adam scales it: {reason}")

    def _sketches(self) -> WeightSketches | None:
        try:
            return weight_source(self.trainer, self.module)
        except ConfigError as reason:
            rank_zero_warn(f"the noise scale of the frozen weights is not measured: {reason}")
            return None
