"""Gradient accumulation that changes while a run goes on: by step, to hold a batch size, or by the noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.accumulation import Horizon, LRRule, may_switch, rescale_rates, step_schedulers, steps_left
from lightning_lora.errors import ConfigError

from .batch_size_monitor import BatchSizeMonitor


class AdaptiveAccumulation(Callback):
    """Changes ``trainer.accumulate_grad_batches`` where no gradient is left over, and takes the schedules along.

    Accumulation *multiplies* the effective batch: rows of a micro-batch x accumulation x data-parallel processes. A
    smaller batch comes from less of it. A change waits for the first batch that begins a window under the old and the
    new number. Learning rates and Adam's second decay follow the batch (`rescale_rates`), and schedules that count
    steps are stretched to the number that will be done.

    Without ``schedule`` a calibrated `BatchSizeMonitor` decides: accumulation is halved while the run is
    signal-limited, and never grows.

    Args:
        schedule: Optimizer step to the accumulation from there on. None: by the monitor.
        lr_rule: ``"sqrt"``, or ``"none"`` to leave learning rates and decays alone.
        max_changes: By the monitor, at most.
        cooldown: Fraction of the run's steps between two of them.

    Raises:
        ConfigError: If the monitor is missing or not calibrated, or the strategy or another callback sets accumulation.
    """

    def __init__(
        self,
        schedule: Mapping[int, int] | None = None,
        lr_rule: LRRule = "sqrt",
        max_changes: int = 3,
        cooldown: float = 0.1,
    ) -> None:
        if schedule is not None and (not schedule or any(step < 0 or k < 1 for step, k in schedule.items())):
            raise ConfigError(f"schedule maps steps from 0 on to accumulations of 1 at least, got {dict(schedule)}.")
        if lr_rule not in ("sqrt", "none"):
            raise ConfigError(f"lr_rule must be 'sqrt' or 'none', got {lr_rule!r}.")
        if max_changes < 0 or not 0 <= cooldown <= 1:
            raise ConfigError(f"max_changes must be 0 at least and cooldown in [0, 1], got {max_changes}, {cooldown}.")
        self.schedule = None if schedule is None else dict(sorted(schedule.items()))
        self.lr_rule: LRRule = lr_rule
        self.max_changes = max_changes
        self.cooldown = cooldown
        self._horizon: Horizon | None = None
        self._loaded: dict[str, Any] = {}
        self._accumulate_grad_batches = 1
        self._num_changes = self._last_change = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be changed; go on with the accumulation of the run that was interrupted."""
        self._refuse(trainer, pl_module)
        loaded, self._loaded = self._loaded, {}
        self._horizon = Horizon(loaded.get("planned", float(trainer.estimated_stepping_batches)))
        if loaded:
            trainer.accumulate_grad_batches = loaded["accumulate_grad_batches"]
            self._horizon.pace = loaded["pace"]
        self._num_changes, self._last_change = loaded.get("num_changes", 0), loaded.get("last_change", 0)
        self._accumulate_grad_batches = trainer.accumulate_grad_batches

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change accumulation if that is wanted and this batch begins a window under both numbers."""
        old, new = trainer.accumulate_grad_batches, self._wanted(trainer)
        if new == old or not may_switch(batch_idx, old, new):
            return
        assert self._horizon is not None
        trainer.accumulate_grad_batches = self._accumulate_grad_batches = new
        rescale_rates(trainer, new / old, self.lr_rule)
        self._horizon.follow(trainer, steps_left(trainer, batch_idx, new))
        self._num_changes += 1
        self._last_change = trainer.global_step
        if (monitor := _monitor(trainer)) is not None:
            monitor.restart()
        rank_zero_info(f"accumulation {old} -> {new} from optimizer step {trainer.global_step + 1} on")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the schedules count what this step is worth."""
        if self._horizon is not None:
            self._horizon.before_step(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        if self._horizon is None:
            return self._loaded
        return {
            "accumulate_grad_batches": self._accumulate_grad_batches,
            "planned": self._horizon.planned,
            "pace": self._horizon.pace,
            "num_changes": self._num_changes,
            "last_change": self._last_change,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the start of training."""
        self._loaded = state_dict

    def _wanted(self, trainer: Trainer) -> int:
        now = trainer.accumulate_grad_batches
        if self.schedule is not None:
            return next((k for step, k in reversed(self.schedule.items()) if step <= trainer.global_step), now)
        monitor = _monitor(trainer)
        assert monitor is not None
        assert self._horizon is not None
        rest = self.cooldown * self._horizon.planned
        is_resting = self._num_changes > 0 and trainer.global_step - self._last_change < rest
        if monitor.state != "signal-limited" or self._num_changes >= self.max_changes or is_resting:
            return now
        return max((k for k in range(1, now // 2 + 1) if now % k == 0), default=now)

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                "DeepSpeed accumulates in its engine, where accumulation cannot change: drop AdaptiveAccumulation."
            )
        if not module.automatic_optimization:
            raise ConfigError("with manual optimization the module decides when to step: drop AdaptiveAccumulation.")
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
            raise ConfigError("GradientAccumulationScheduler sets accumulation in every epoch: keep one of the two.")
        if self.schedule is None:
            monitor = _monitor(trainer)
            if monitor is None or monitor.calibration is None:
                raise ConfigError(
                    "without a schedule AdaptiveAccumulation needs a BatchSizeMonitor with a calibration: a raw noise "
                    "scale is no ground to change a run. Run `lightning-lora probe`, or give a schedule."
                )
        step_schedulers(trainer)


def _monitor(trainer: Trainer) -> BatchSizeMonitor | None:
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback for callback in callbacks if isinstance(callback, BatchSizeMonitor)), None)
