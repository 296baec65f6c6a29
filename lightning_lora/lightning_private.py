"""Private attributes of Lightning 2.6 that several rooms need, each under a name that says what it gives.

Attributes that one file alone uses stay there: loop counters and restart flags in `checkpoints.loop_position`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from torch.optim.swa_utils import AveragedModel


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Trainer of ``module``, or None without one; ``module.trainer`` raises then."""
    return module._trainer


def training_loader_source(trainer: Trainer) -> _DataLoaderSource:
    """Maker of the training loaders: ``instance`` is a module, data module or loader, ``dataloader()`` makes them."""
    return trainer.fit_loop._data_source


def training_loaders(trainer: Trainer) -> list[Any]:
    """All training loaders in one list; empty before Lightning has made them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def training_fetcher(trainer: Trainer) -> _DataFetcher | None:
    """Iterator that fetches the training batches, or None before Lightning has made it."""
    return trainer.fit_loop._data_fetcher


def remake_training_loaders(trainer: Trainer) -> None:
    """Ask the source for training loaders again, in place of those already made."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the present batch only adds to the gradients: the optimizer steps at a later batch."""
    return trainer.fit_loop._should_accumulate()


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Copy of the module that ``callback`` averages into, or None outside ``fit``."""
    return callback._average_model
