"""What we ask of a Trainer: its callbacks, in order, the folder of the run, and to be its module's when it saves."""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.lightning_private import attached_trainer

Kind = TypeVar("Kind", bound=Callback)

# What callbacks and commands write in the folder of a run: a folder that holds one of these belongs to a run.
RUN_FILES = (
    *("adapters", "merged", "config.yaml", "events.jsonl", "curve.csv", "loss.png", "batch_size.png", "capacity.png"),
    *("batch_probe.json", "batch_probe.png", "rank_probe.json", "rank_probe.png"),
    *("report.html", "report.md", "report.csv"),
)

_CHOSEN: WeakKeyDictionary[Trainer, tuple[str, str]] = WeakKeyDictionary()


def found(trainer: Trainer, *kinds: type[Kind]) -> Kind | None:
    """The first callback of ``trainer`` that is an instance of one of ``kinds``, or None."""
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, kinds)), None)


def move_last(trainer: Trainer, callback: Callback) -> None:
    """Move ``callback`` behind all others of ``trainer``, so that its hooks see what theirs have done."""
    others = [other for other in _callbacks(trainer) if other is not callback]
    trainer.callbacks = [*others, callback]  # pyright: ignore[reportAttributeAccessIssue]


def warn_if_beyond_run(trainer: Trainer, setting: str, step: float) -> None:
    """Warn of a setting that begins at an optimizer step, counted from 1, which the run does not reach."""
    planned = trainer.estimated_stepping_batches
    # By hand, a module may take any number of steps in a batch.
    if step > planned and trainer.lightning_module.automatic_optimization:
        rank_zero_warn(f"{setting} has no effect: the run ends with optimizer step {planned:.0f}.")


def run_folder(trainer: Trainer) -> str:
    """The folder for the files of this run, never that of another run. A collective: all ranks must call.

    It is `shared_folder` if that is the run's own. A shared folder that holds files of an earlier Trainer is left as it
    is: the run gets ``version_1`` in it, or the next number that is free. May be remote.
    """
    folder, is_own = shared_folder(trainer)
    if not is_own:
        if _CHOSEN.get(trainer, ("", ""))[0] != folder:
            _CHOSEN[trainer] = folder, _first_unused(folder)
        folder = _CHOSEN[trainer][1]
    return trainer.strategy.broadcast(folder)


def shared_folder(trainer: Trainer) -> tuple[str, bool]:
    """The folder in which this run writes, and whether it is surely its own; other runs may write there if not.

    It is the folder of a CSV or TensorBoard logger. Otherwise it is the folder beside the checkpoints of Lightning's
    ``ModelCheckpoint``: from its ``dirpath``, from name and version of the logger, or ``default_root_dir``.
    """
    logger = trainer.logger
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return logger.log_dir, True
    folder, is_own = trainer.default_root_dir, False
    if logger is not None:
        version, is_own = logger.version, logger.version not in (None, "")
        version = version if isinstance(version, str) else f"version_{version}"
        folder = os.path.join(logger.save_dir or folder, *filter(None, (str(logger.name), version)))
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    if checkpoints is None or str(checkpoints) == os.path.join(folder, "checkpoints"):
        return folder, is_own
    above, name = os.path.split(str(checkpoints))
    return (above if name == "checkpoints" else str(checkpoints)), False


def _first_unused(folder: str) -> str:
    """``folder``, or the first ``version_N`` in it, that holds no file of a run."""
    files = get_filesystem(folder)
    candidate, number = folder, 0
    while any(files.exists(os.path.join(candidate, name)) for name in RUN_FILES):
        number += 1
        candidate = os.path.join(folder, f"version_{number}")
    return candidate


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def attach_when_saving(trainer: Trainer) -> None:
    """Let ``trainer`` attach itself to its module while it saves a checkpoint, and whatever was attached afterwards.

    The hooks of a module learn of no Trainer but the attached one, which is that of the latest run: another Trainer may
    have tested the module since.
    """
    # A Trainer that has a method of its own there is left alone: it is ours, or a stand-in of the user.
    if "save_checkpoint" not in vars(trainer):
        trainer.save_checkpoint = functools.partial(_save_attached, trainer, trainer.save_checkpoint)


def _save_attached(trainer: Trainer, save: Any, *args: Any, **kwargs: Any) -> None:
    module: LightningModule | None = trainer.lightning_module
    if module is None:
        save(*args, **kwargs)
        return
    attached, module.trainer = attached_trainer(module), trainer
    try:
        save(*args, **kwargs)
    finally:
        module.trainer = attached
