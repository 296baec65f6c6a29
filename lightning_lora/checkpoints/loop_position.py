"""Position of a run in Lightning's loops, and how to restore it.

The counters that Lightning 2.6 saves are not enough to restart exactly. From a file written after the last batch of an
epoch, Lightning skips the validation and the end of that epoch; with ``max_steps`` it restarts wrongly at the end of an
epoch; and a plateau scheduler misses its update. This file therefore sets the counters and flags to the values they
have at the same place in an uninterrupted run. No other file sets private state of Lightning's loops, and an attribute
that another Lightning release no longer has is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop

from lightning_lora.lightning_private import is_accumulating, training_fetcher

# Lightning's names of these stages; a test compares them.
_MID_EPOCH = "restarted_mid_epoch"
_ON_LAST = "restarted_on_last"
_MID_EVALUATION = "restarted_mid_evaluation"
_NONE = "none"


@dataclass(frozen=True)
class LoopPosition:
    """A position in Lightning's fit loop.

    Attributes:
        num_epochs: Finished epochs.
        num_batches: Batches of the unfinished epoch that each rank has trained on; 0 between epochs.
        is_epoch_over: Whether the run is between epochs.
        is_plateau_due: Whether plateau schedulers have yet to be updated for the epoch that is over.
        is_batch_open: Whether counting the last batch, and validating after it, have yet to be done.
        is_validated: Whether the validation after the last batch is already done.
        is_between_batches: False in the middle of a batch, which is then repeated.
    """

    num_epochs: int
    num_batches: int
    is_epoch_over: bool
    is_plateau_due: bool
    is_batch_open: bool
    is_validated: bool
    is_between_batches: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoopPosition:
        """Build a position from the result of `to_dict`."""
        return cls(**fields)


def current_position(trainer: Trainer) -> LoopPosition:
    """Position of ``trainer`` in its fit loop."""
    loop = trainer.fit_loop
    # Lightning's types declare only half of these counters.
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    num_epochs, is_counted = epochs.processed, epochs.processed == epochs.ready
    # Lightning counts an epoch in which the run was stopped, although some of its batches are left.
    is_stopped = is_counted and batches.ready > 0 and not loop.epoch_loop._num_ready_batches_reached()
    # While the hooks at the start of an epoch run, the batch counters are still those of the epoch before.
    is_over = (is_counted and not is_stopped) or epochs.started < epochs.ready
    seen = loop.epoch_loop.val_loop.batch_progress
    is_whole = batches.processed == batches.ready
    return LoopPosition(
        num_epochs=num_epochs - 1 if is_stopped else num_epochs,
        num_batches=0 if is_over else batches.ready if is_whole else batches.completed,
        is_epoch_over=is_over,
        is_plateau_due=is_over and epochs.completed < epochs.processed,
        is_batch_open=not is_over and is_whole and (batches.completed < batches.ready or trainer.validating),
        is_validated=trainer.validating and seen.is_last_batch and seen.current.completed == seen.current.ready,
        is_between_batches=is_over or is_whole,
    )


def restore_position(trainer: Trainer, position: LoopPosition, metrics: Mapping[str, float]) -> None:
    """Set Lightning's loops, which have loaded their state and begun to run, to ``position``.

    Args:
        metrics: ``trainer.callback_metrics`` at that position; a plateau scheduler that is due reads them.
    """
    device = trainer.strategy.root_device
    known = trainer._logger_connector._callback_metrics
    # In float64, as the numbers were: a schedule compares them with those of the run before. Apple GPUs have none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    known.update({name: torch.tensor(value, device=device, dtype=dtype) for name, value in metrics.items()})
    if position.is_plateau_due:
        _set_counters(trainer.fit_loop.epoch_progress, ready=position.num_epochs, done=position.num_epochs - 1)
        trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if position.is_epoch_over:
        _restore_between_epochs(trainer.fit_loop, position)
    else:
        _restore_within_epoch(trainer, position)


def begin_epoch(trainer: Trainer) -> None:
    """Clear the flag that the epoch was over when the file was written; Lightning would end the next epoch too."""
    _set(trainer.fit_loop.epoch_loop, restarting=False)


def _restore_between_epochs(loop: _FitLoop, position: LoopPosition) -> None:
    _set_counters(loop.epoch_progress, ready=position.num_epochs, done=position.num_epochs)
    _set(loop, restarting=False)
    # With max_steps Lightning takes every loaded run for one in an unfinished epoch.
    _set(loop, _restarting=False)
    # Otherwise it would use the iterators that it made before the random generators were restored.
    _set(loop, _resuming_from_checkpoint=False, _restart_stage=_NONE)
    _set(loop.epoch_loop, restarting=False, _restart_stage=_NONE)


def _restore_within_epoch(trainer: Trainer, position: LoopPosition) -> None:
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    _set_counters(loop.epoch_progress, ready=position.num_epochs + 1, done=position.num_epochs)
    _set_counters(epoch_loop.batch_progress, ready=position.num_batches, done=position.num_batches)
    if not position.is_between_batches:
        _set(epoch_loop.batch_progress, is_last_batch=False)
    # The epoch continues, and its end must not be taken for the end of a loaded epoch.
    _set(epoch_loop, restarting=True)
    _set(loop, _restarting=False, _restart_stage=_MID_EPOCH)
    _finish_batch(trainer, position)


def _finish_batch(trainer: Trainer, position: LoopPosition) -> None:
    """Do what is left after the last batch, by means of Lightning's epoch loop where possible."""
    epoch_loop, fetcher = trainer.fit_loop.epoch_loop, training_fetcher(trainer)
    assert fetcher is not None
    validation = epoch_loop.val_loop
    is_step = not is_accumulating(trainer)
    is_due = epoch_loop._should_check_val_fx(fetcher)
    if not position.is_batch_open and is_step:
        # The loop will count this step again.
        _set(epoch_loop, _batches_that_stepped=epoch_loop._batches_that_stepped - 1)
    if is_due:
        # In these stages the loop first finishes the batch, with or without validation.
        _set(epoch_loop, _restart_stage=_ON_LAST)
        is_validation_due = position.is_batch_open and not position.is_validated
        _set(validation, restarting=False, _has_run=False)
        _set(validation, _restart_stage=_MID_EVALUATION if is_validation_due else _NONE)
        return
    if position.is_batch_open:
        epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
    _set(epoch_loop, _restart_stage=_NONE)
    # The loop ends after the last batch unless it waits for a validation.
    _set(validation, _has_run=epoch_loop._num_ready_batches_reached())


def _set_counters(progress: Any, ready: int, done: int) -> None:
    """Set the counters of this run and change the total counters by the same amounts."""
    for name, value in (("ready", ready), ("started", ready), ("processed", done), ("completed", done)):
        change = value - getattr(progress.current, name)
        _set(progress.current, **{name: value})
        _set(progress.total, **{name: getattr(progress.total, name) + change})


def _set(owner: object, **values: Any) -> None:
    """Set attributes that ``owner`` already has.

    Raises:
        RuntimeError: If ``owner`` lacks one of them: setting it would have no effect, and the restart would be wrong.
    """
    for name, value in values.items():
        if not hasattr(owner, name):
            raise RuntimeError(
                f"exact resume knows Lightning 2.6; Lightning {lightning.__version__} has no "
                f"{type(owner).__name__}.{name}. Install lightning>=2.6.6,<2.7."
            )
        setattr(owner, name, value)
