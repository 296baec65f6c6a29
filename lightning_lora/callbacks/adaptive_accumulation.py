"""Gradient accumulation that changes while a run goes on: by step, or by the noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch.accumulation import Horizon, LRRule, may_switch, rescale_rates, step_schedulers, steps_left
from lightning_lora.batch.division import divisors, refuse_two_masters
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_ranks, present_batch, rows_at_once
from lightning_lora.errors import ConfigError
from lightning_lora.files.events import write_event
from lightning_lora.lightning_private import training_loader_source

from .batch_size_monitor import BatchSizeMonitor
from .target_batch_size import TargetBatchSize


class AdaptiveAccumulation(Callback):
    """Changes ``trainer.accumulate_grad_batches`` where no gradient is left over, and takes the schedules along.

    Accumulation *multiplies* the effective batch: rows of a micro-batch x accumulation x data-parallel processes. A
    smaller batch comes from less of it. A change waits for the first batch that begins a window under the old and the
    new number. Learning rates and Adam's second decay follow the batch (`fit_to_batch`), and schedules that count
    steps are stretched to the number that will be done. Each change is logged as ``batch/k`` and in ``events.jsonl``.

    Without ``schedule`` a calibrated `BatchSizeMonitor` decides: accumulation is halved while the run is
    signal-limited, and never grows. A checkpoint goes on with steps of the same rows, on more or fewer devices too.

    Args:
        schedule: Optimizer step to the accumulation from there on, for the devices and the micro-batch that the run
            starts with. None: by the monitor.
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
        self._batch = EffectiveBatch(1, 1, 1)
        self._unit_rows = self._planned_rows = 1
        self._num_changes = self._last_change = 0
        self._is_at_end = False
        self._folder = Path()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be changed, before anything is loaded."""
        if stage == "fit":
            self._refuse(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Plan schedules for steps of as many rows as then, if they are not made yet; FSDP2 loads after that."""
        loaded = checkpoint["callbacks"].get(self.state_key)
        if loaded is not None and not trainer.strategy.restore_checkpoint_after_setup:
            with kept_random_state(trainer.strategy.root_device):
                loaders = training_loader_source(trainer).dataloader()
            at_once = (rows_at_once(loaders) or 1) * data_parallel_ranks(trainer)
            if loaded["planned_rows"] % at_once == 0:
                trainer.accumulate_grad_batches = loaded["planned_rows"] // at_once

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse schedules that cannot be stretched; go on with the steps of the run that was interrupted."""
        step_schedulers(trainer)
        # Reading log_dir is a collective: every rank must do it.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._batch = present_batch(trainer)
        self._unit_rows, self._planned_rows = self._batch.rows // self._batch.accumulation, self._batch.rows
        self._horizon = Horizon(float(trainer.estimated_stepping_batches))
        self._num_changes = self._last_change = 0
        self._is_at_end = False
        if self._loaded:
            self._go_on(trainer, self._horizon, self._loaded)
            self._loaded = {}
        self._log(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change accumulation if that is wanted and this batch begins a window under both numbers."""
        assert self._horizon is not None
        old, new = trainer.accumulate_grad_batches, self._wanted(trainer)
        if new != old and may_switch(batch_idx, old, new):
            self._change(trainer, new)
            self._horizon.follow(trainer, steps_left(trainer, batch_idx, new))
        elif self._horizon.is_stale:
            self._horizon.follow(trainer, steps_left(trainer, batch_idx, old))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the schedules count what this step is worth."""
        if self._horizon is not None:
            self._horizon.before_step(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, on any number of devices."""
        if self._horizon is None:
            return self._loaded
        return {
            "batch": list(astuple(self._batch)),
            "unit_rows": self._unit_rows,
            "planned_rows": self._planned_rows,
            "planned": self._horizon.planned,
            "pace": self._horizon.pace,
            "num_changes": self._num_changes,
            "last_change": self._last_change,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the start of training."""
        self._loaded = state_dict

    def _go_on(self, trainer: Trainer, horizon: Horizon, loaded: Mapping[str, Any]) -> None:
        before, self._unit_rows = EffectiveBatch(*loaded["batch"]), loaded["unit_rows"]
        self._num_changes, self._last_change = loaded["num_changes"], loaded["last_change"]
        self._set(trainer, self._accumulation(before.rows, f"the checkpoint ({before}) has steps"))
        for step, k in (self.schedule or {}).items():
            self._accumulation(k * self._unit_rows, f"from step {step} on the schedule has steps")
        horizon.go_on(trainer, loaded["planned"], loaded["pace"], loaded["planned_rows"] / self._planned_rows)

    def _accumulation(self, rows: int, what: str) -> int:
        """How many micro-batches of the present devices are ``rows``."""
        at_once = self._batch.micro_batch * self._batch.num_ranks
        if rows % at_once:
            raise ConfigError(
                f"{what} of {rows} rows, which {self._batch.micro_batch} rows x {self._batch.num_ranks} devices do not "
                f"divide: choose batch_size and devices so that their product does."
            )
        return rows // at_once

    def _change(self, trainer: Trainer, new: int) -> None:
        old, before = self._batch.accumulation, self._batch.rows
        self._set(trainer, new)
        factor = rescale_rates(
            trainer, before / self._planned_rows, self._batch.rows / self._planned_rows, self.lr_rule
        )
        self._num_changes += 1
        self._last_change = trainer.global_step
        if (monitor := BatchSizeMonitor.of(trainer)) is not None:
            monitor.restart()
        self._log(trainer)
        if trainer.is_global_zero:
            event = {"event": "accumulation", "step": trainer.global_step, "old": old, "new": new, "lr_factor": factor}
            write_event(self._folder, event)
        at = f"from optimizer step {trainer.global_step + 1} on"
        rank_zero_info(f"accumulation {old} -> {new} {at}; learning rates x {factor:.3g}")

    def _set(self, trainer: Trainer, accumulation: int) -> None:
        trainer.accumulate_grad_batches = accumulation
        self._batch = replace(self._batch, accumulation=accumulation)

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"batch/k": float(self._batch.accumulation)}, trainer.global_step)

    def _wanted(self, trainer: Trainer) -> int:
        now = self._batch.accumulation
        if self.schedule is not None:
            due = next((k for step, k in reversed(self.schedule.items()) if step <= trainer.global_step), None)
            return now if due is None else self._accumulation(due * self._unit_rows, "the schedule has steps")
        if now == 1:
            if not self._is_at_end:
                self._is_at_end = True
                rank_zero_info("accumulation is 1: only fewer devices or a smaller micro-batch make the batch smaller.")
            return now
        monitor = BatchSizeMonitor.of(trainer)
        assert monitor is not None
        assert self._horizon is not None
        is_resting = self._num_changes > 0 and (
            trainer.global_step - self._last_change < self.cooldown * self._horizon.planned
        )
        if monitor.state != "signal-limited" or self._num_changes >= self.max_changes or is_resting:
            return now
        return next(k for k in divisors(now) if k <= now / 2)

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                "DeepSpeed accumulates in its engine, where accumulation cannot change: drop AdaptiveAccumulation."
            )
        refuse_two_masters(trainer, module, "AdaptiveAccumulation")
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if self.schedule is not None and any(isinstance(callback, TargetBatchSize) for callback in callbacks):
            raise ConfigError(
                "a schedule sets accumulation, and target_batch_size chooses it: keep one of the two. Without a "
                "schedule, AdaptiveAccumulation starts from the target."
            )
        if self.schedule is None:
            monitor = BatchSizeMonitor.of(trainer)
            if monitor is None or monitor.calibration is None:
                raise ConfigError(
                    "without a schedule AdaptiveAccumulation needs a BatchSizeMonitor with a calibration: a raw noise "
                    "scale is no ground to change a run. Run `lightning-lora probe`, or give a schedule."
                )
