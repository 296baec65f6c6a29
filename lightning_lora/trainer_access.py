"""What we ask of a Trainer: its callbacks, in order, the folder of the run, and to be its module's when it saves."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lora.lightning_private import attached_trainer

Kind = TypeVar("Kind", bound=Callback)


def found(trainer: Trainer, *kinds: type[Kind]) -> Kind | None:
    """The first callback of ``trainer`` that is an instance of one of ``kinds``, or None."""
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, kinds)), None)


def move_last(trainer: Trainer, callback: Callback) -> None:
    """Move ``callback`` behind all others of ``trainer``, so that its hooks see what theirs have done."""
    others = [other for other in _callbacks(trainer) if other is not callback]
    trainer.callbacks = [*others, callback]  # pyright: ignore[reportAttributeAccessIssue]


def run_folder(trainer: Trainer) -> str:
    """The logger's folder, or ``default_root_dir`` without one; may be remote. A collective: all ranks must call."""
    return trainer.log_dir or trainer.default_root_dir


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def attach_when_saving(trainer: Trainer) -> None:
    """Let ``trainer`` attach itself to its module while it saves a checkpoint, and whatever was attached afterwards.

    The hooks of a module learn of no Trainer but the attached one, which is that of the latest run: another Trainer may
    have tested the module since.
    """
    save = trainer.save_checkpoint
    if getattr(save, "func", None) is not _save_attached:
        trainer.save_checkpoint = functools.partial(_save_attached, trainer, save)


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
