"""Where in its loops a run is, and putting Lightning's loops back there.

Lightning 2.6 restarts from counters that do not say enough: of a file written after the last batch of an epoch it skips
the validation and the end of that epoch, with ``max_steps`` it goes astray at an epoch's end, and a plateau scheduler
misses its update. The counters are therefore set here, to what they are at that place in a run that goes on. Everything
private of Lightning's loops that we set is in this file; what another Lightning no longer has is refused, not set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning
from lightning.pytorch import Trainer

# What Lightning calls these stages; a test compares them.
_MID_EPOCH = "restarted_mid_epoch"
_ON_LAST = "restarted_on_last"
_MID_EVALUATION = "restarted_mid_evaluation"
_NONE = "none"


@dataclass(frozen=True)
class Point:
    """A place in a run.

    Attributes:
        num_epochs: Epochs that are over.
        num_batches: Batches of the unfinished epoch that were trained on, by each rank; 0 between epochs.
        is_epoch_over: Whether the run is between epochs.
        is_plateau_due: Whether plateau schedulers of that epoch still have to be told.
        is_batch_open: Whether validation and counting after the last batch are still to come.
        is_validated: Whether its validation is over already.
        is_between_batches: False in the middle of a batch, which is then done again.
    """

    num_epochs: int
    num_batches: int
    is_epoch_over: bool
    is_plateau_due: bool
    is_batch_open: bool
    is_validated: bool
    is_between_batches: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Point:
        """From what `to_dict` gave."""
        return cls(**fields)


def position(trainer: Trainer) -> Point:
    """Where ``trainer`` is in its fit loop now."""
    loop = trainer.fit_loop
    # Lightning's types know half of these counters.
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    num_epochs, is_counted = epochs.processed, epochs.processed == epochs.ready
    # A run that was stopped within an epoch counts it, but has not seen all of it.
    is_stopped = is_counted and batches.ready > 0 and not loop.epoch_loop._num_ready_batches_reached()
    # While an epoch's hooks begin it, the batches are still those of the one before.
    is_over = (is_counted and not is_stopped) or epochs.started < epochs.ready
    seen = loop.epoch_loop.val_loop.batch_progress
    is_whole = batches.processed == batches.ready
    return Point(
        num_epochs=num_epochs - 1 if is_stopped else num_epochs,
        num_batches=0 if is_over else batches.ready if is_whole else batches.completed,
        is_epoch_over=is_over,
        is_plateau_due=is_over and epochs.completed < epochs.processed,
        is_batch_open=not is_over and is_whole and (batches.completed < batches.ready or trainer.validating),
        is_validated=trainer.validating and seen.is_last_batch and seen.current.completed == seen.current.ready,
        is_between_batches=is_over or is_whole,
    )


def go_to(trainer: Trainer, point: Point) -> None:
    """Put the loops, which have loaded their state and begun to run, where they were at ``point``."""
    loop = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    if point.is_plateau_due:
        _level(loop.epoch_progress, ready=point.num_epochs, done=point.num_epochs - 1)
        epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if point.is_epoch_over:
        _level(loop.epoch_progress, ready=point.num_epochs, done=point.num_epochs)
        _put(loop, restarting=False)
        # With max_steps Lightning takes every loaded run for an unfinished epoch.
        _put(loop, _restarting=False)
        # Or it would go on with the iterators it made before the random numbers were put back.
        _put(loop, _resuming_from_checkpoint=False, _restart_stage=_NONE)
        _put(epoch_loop, restarting=False, _restart_stage=_NONE)
    else:
        _level(loop.epoch_progress, ready=point.num_epochs + 1, done=point.num_epochs)
        _level(epoch_loop.batch_progress, ready=point.num_batches, done=point.num_batches)
        if not point.is_between_batches:
            _put(epoch_loop.batch_progress, is_last_batch=False)
        # The epoch goes on, and its end must not be taken for one that was loaded.
        _put(epoch_loop, restarting=True)
        _put(loop, _restarting=False, _restart_stage=_MID_EPOCH)
        _finish_batch(trainer, point)


def begin_epoch(trainer: Trainer) -> None:
    """Forget that an epoch was over when the file was written: Lightning remembers, and would end the next one too."""
    _put(trainer.fit_loop.epoch_loop, restarting=False)


def _finish_batch(trainer: Trainer, point: Point) -> None:
    """What is left to do after the last batch, by the epoch loop where it can be made to."""
    epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    validation = epoch_loop.val_loop
    is_step = not epoch_loop._should_accumulate()
    is_due = epoch_loop._should_check_val_fx(fetcher)
    if not point.is_batch_open and is_step:
        # The loop will count this step once more.
        _put(epoch_loop, _batches_that_stepped=epoch_loop._batches_that_stepped - 1)
    if is_due:
        # In these stages the loop first does the rest of the batch, with or without validation.
        _put(epoch_loop, _restart_stage=_ON_LAST)
        is_validation_due = point.is_batch_open and not point.is_validated
        _put(validation, restarting=False, _has_run=False)
        _put(validation, _restart_stage=_MID_EVALUATION if is_validation_due else _NONE)
        return
    if point.is_batch_open:
        epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
    _put(epoch_loop, _restart_stage=_NONE)
    # The loop is over if its batches are, unless it waits for a validation.
    _put(validation, _has_run=epoch_loop._num_ready_batches_reached())


def _level(progress: Any, ready: int, done: int) -> None:
    """Set the counters of this run, and move the total ones along."""
    for name, value in (("ready", ready), ("started", ready), ("processed", done), ("completed", done)):
        change = value - getattr(progress.current, name)
        _put(progress.current, **{name: value})
        _put(progress.total, **{name: getattr(progress.total, name) + change})


def _put(owner: object, **values: Any) -> None:
    """Set attributes that ``owner`` has: one of another name would be set in vain, and the run go astray."""
    for name, value in values.items():
        if not hasattr(owner, name):
            raise RuntimeError(
                f"exact resume knows Lightning 2.6; Lightning {lightning.__version__} has no "
                f"{type(owner).__name__}.{name}. Install lightning>=2.6.6,<2.7."
            )
        setattr(owner, name, value)
