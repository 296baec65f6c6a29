"""What callbacks ask of a Trainer: its other callbacks, in order, and the folder of the run."""

from __future__ import annotations

from typing import TypeVar

from lightning.pytorch import Callback, Trainer

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
