"""Changes gradient accumulation during a run, by the optimizer step or by the noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch.accumulation import (
    LRRule,
    StretchedSchedule,
    may_switch,
    rescale_rates,
    step_schedulers,
    steps_left,
)
from lightning_lora.batch.division import check_may_set_accumulation, divisors
from lightning_lora.batch.run_events import RunEvents
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_size, loader_batch_size
from lightning_lora.errors import AccumulationError, check_arguments
from lightning_lora.lightning_private import training_loader_source
from lightning_lora.trainer_access import found

from .batch_size_monitor import BatchSizeMonitor
from .target_batch_size import TargetBatchSize


class AdaptiveAccumulation(Callback):
    """Changes ``trainer.accumulate_grad_batches`` between accumulation windows, and adjusts rates and schedules.

    Accumulation *multiplies* the effective batch: rows of a micro-batch x accumulation x data-parallel processes. Less
    accumulation makes a smaller batch. A change waits for the first batch that begins a window under both the old and
    the new number, so that no gradient is lost or used twice. Learning rates and Adam's second decay follow the batch
    (`fit_to_batch`), and schedules that count steps are stretched to the steps that will be done. Each change is logged
    as ``batch/k`` and in ``events.jsonl``.

    Without ``schedule`` a calibrated `BatchSizeMonitor` decides: accumulation is halved while the run is
    signal-limited, and never grows. A resumed run continues with the same rows per step, also on more or fewer devices.

    Args:
        schedule: Maps an optimizer step to the accumulation from this step on, for the devices and the micro-batch
            that the run starts with. None lets the monitor decide.
        lr_rule: ``"sqrt"``, or ``"none"`` to leave learning rates and decays unchanged.
        max_changes: Most changes that the monitor may make in one run.
        cooldown: Fraction of the run's steps between two changes by the monitor.

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
        check_arguments(AdaptiveAccumulation, locals(), AccumulationError)
        if schedule is not None and (not schedule or any(step < 0 or k < 1 for step, k in schedule.items())):
            raise AccumulationError(f"schedule must map steps >= 0 to accumulations >= 1, got {dict(schedule)}.")
        if lr_rule not in ("sqrt", "none"):
            raise AccumulationError(f"lr_rule must be 'sqrt' or 'none', got {lr_rule!r}.")
        if max_changes < 0 or not 0 <= cooldown <= 1:
            raise AccumulationError(
                f"max_changes must be >= 0 and cooldown in [0, 1], got {max_changes} and {cooldown}."
            )
        self.schedule = None if schedule is None else dict(sorted(schedule.items()))
        self.lr_rule: LRRule = lr_rule
        self.max_changes = max_changes
        self.cooldown = cooldown
        self._stretched: StretchedSchedule | None = None
        self._loaded: dict[str, Any] = {}
        self._batch = EffectiveBatch(1, 1, 1)
        # Rows of a step without accumulation when the run started, and of the steps that schedules were planned for.
        self._unit_rows = self._planned_rows = 1
        self._num_changes = self._last_change = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse runs whose accumulation cannot be changed, before anything is loaded."""
        if stage == "fit":
            self._refuse(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set accumulation before schedules are made, so that they count steps of as many rows as in the checkpoint.

        FSDP2 reads the checkpoint later, and `StretchedSchedule.resume` adjusts its schedules.
        """
        loaded = checkpoint["callbacks"].get(self.state_key)
        if loaded is not None and not trainer.strategy.restore_checkpoint_after_setup:
            with kept_random_state(trainer.strategy.root_device):
                loaders = training_loader_source(trainer).dataloader()
            at_once = (loader_batch_size(loaders) or 1) * data_parallel_size(trainer)
            if loaded["planned_rows"] % at_once == 0:
                trainer.accumulate_grad_batches = loaded["planned_rows"] // at_once

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse schedules that cannot be stretched, and continue those of an interrupted run."""
        step_schedulers(trainer)
        self._events = RunEvents(trainer, "AdaptiveAccumulation")
        self._batch = EffectiveBatch.of(trainer)
        self._unit_rows, self._planned_rows = self._batch.rows // self._batch.accumulation, self._batch.rows
        self._stretched = StretchedSchedule(float(trainer.estimated_stepping_batches))
        self._num_changes = self._last_change = 0
        self._has_told_least = False
        if self._loaded:
            self._resume(trainer, self._stretched, self._loaded)
            self._loaded = {}
        self._log(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change accumulation if another number is due and this batch begins a window under both."""
        assert self._stretched is not None
        old, new = trainer.accumulate_grad_batches, self._due_accumulation(trainer, self._stretched)
        if new != old and may_switch(batch_idx, old, new):
            self._change(trainer, new)
            self._stretched.stretch(trainer, steps_left(trainer, batch_idx, new))
        elif self._stretched.is_stale:
            self._stretched.stretch(trainer, steps_left(trainer, batch_idx, old))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Advance the schedules by the planned steps that this step stands for."""
        if self._stretched is not None:
            self._stretched.advance(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The rows of a step and the place in the schedules, from which a run continues on any number of devices."""
        if self._stretched is None:
            return self._loaded
        return {
            "batch": list(astuple(self._batch)),
            "unit_rows": self._unit_rows,
            "planned_rows": self._planned_rows,
            "planned": self._stretched.planned,
            "pace": self._stretched.planned_per_step,
            "num_changes": self._num_changes,
            "last_change": self._last_change,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = state_dict

    def _resume(self, trainer: Trainer, stretched: StretchedSchedule, loaded: Mapping[str, Any]) -> None:
        before, self._unit_rows = EffectiveBatch(*loaded["batch"]), loaded["unit_rows"]
        self._num_changes, self._last_change = loaded["num_changes"], loaded["last_change"]
        self._set(trainer, self._accumulation(before.rows, f"the checkpoint ({before}) has steps"))
        for step, k in (self.schedule or {}).items():
            self._accumulation(k * self._unit_rows, f"from step {step} on the schedule has steps")
        stretched.resume(trainer, loaded["planned"], loaded["pace"], loaded["planned_rows"] / self._planned_rows)

    def _accumulation(self, rows: int, what: str) -> int:
        """The accumulation that makes steps of ``rows`` rows on the present devices."""
        at_once = self._batch.micro_batch * self._batch.num_ranks
        if rows % at_once:
            raise AccumulationError(
                f"{what} of {rows} rows, which {self._batch.micro_batch} rows x {self._batch.num_ranks} devices do not "
                f"divide: choose batch_size and devices whose product divides {rows}."
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
        if (monitor := found(trainer, BatchSizeMonitor)) is not None:
            monitor.restart()
        self._log(trainer)
        self._events.write("accumulation", trainer.global_step, {"old": old, "new": new, "lr_factor": factor})
        at = f"from optimizer step {trainer.global_step + 1} on"
        rank_zero_info(f"accumulation {old} -> {new} {at}; learning rates x {factor:.3g}")

    def _set(self, trainer: Trainer, accumulation: int) -> None:
        trainer.accumulate_grad_batches = accumulation
        self._batch = replace(self._batch, accumulation=accumulation)

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"batch/k": float(self._batch.accumulation)}, trainer.global_step)

    def _due_accumulation(self, trainer: Trainer, stretched: StretchedSchedule) -> int:
        """The accumulation that the schedule or the monitor asks for now."""
        now = self._batch.accumulation
        if self.schedule is not None:
            due = next((k for step, k in reversed(self.schedule.items()) if step <= trainer.global_step), None)
            return now if due is None else self._accumulation(due * self._unit_rows, "the schedule has steps")
        if now == 1:
            if not self._has_told_least:
                self._has_told_least = True
                rank_zero_info("accumulation is 1: only fewer devices or a smaller micro-batch make the batch smaller.")
            return now
        monitor = found(trainer, BatchSizeMonitor)
        assert monitor is not None
        is_resting = self._num_changes > 0 and (
            trainer.global_step - self._last_change < self.cooldown * stretched.planned
        )
        if monitor.state != "signal-limited" or self._num_changes >= self.max_changes or is_resting:
            return now
        return next(k for k in divisors(now) if k <= now / 2)

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise AccumulationError(
                "DeepSpeed accumulates inside its engine, which cannot change during a run: drop AdaptiveAccumulation."
            )
        check_may_set_accumulation(trainer, module, "AdaptiveAccumulation")
        if self.schedule is not None and found(trainer, TargetBatchSize) is not None:
            raise AccumulationError(
                "the schedule of AdaptiveAccumulation and target_batch_size both set accumulation: keep one of the "
                "two. Without a schedule, AdaptiveAccumulation starts from the target."
            )
        if self.schedule is None:
            monitor = found(trainer, BatchSizeMonitor)
            if monitor is None or monitor.calibration is None:
                raise AccumulationError(
                    "without a schedule AdaptiveAccumulation needs a BatchSizeMonitor with a calibration, because a "
                    "raw noise scale does not show what a batch costs. Run `lightning-lora probe`, or give a schedule."
                )
