"""The data module and its training loader as a run would see them, without changing the data module that was given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_lora.batch.trial_step import can_choose_rows, longest_batch
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.split import row_lengths
from lightning_lora.errors import DataError


def quiet_trainer(module: LightningModule) -> Trainer:
    """A Trainer on the CPU that writes nothing, with the module whose tokenizer and vocabulary count."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    return trainer


def set_up(datamodule: LightningDataModule, trainer: Trainer) -> LightningDataModule:
    """A copy of a data module that is set up for training; the given one stays as it is."""
    ready = copy.copy(datamodule)
    for name, value in list(vars(ready).items()):
        if type(value) in (dict, list, set):
            setattr(ready, name, copy.copy(value))
    ready.trainer = trainer
    ready.prepare_data()
    ready.setup("fit")
    return ready


def largest_batches(data: LightningDataModule, loader: Any, trainer: Trainer) -> Callable[[int], Any]:
    """A function from a number of rows to the batch of so many rows that needs the most memory.

    A padded batch is as long as its longest row, and the longest row comes in some batch of every epoch. Of rows that
    are no token sequences, the longest are searched among the first 1,000.

    Raises:
        DataError: If the loader gives no batch.
    """
    if isinstance(data, RowsDataModule) and "train" in data.rows and not getattr(data, "packing", False):
        lengths = row_lengths(data.rows["train"], data.max_length)
        longest = loader.dataset[int(numpy.argmax(lengths))]
        return lambda count: loader.collate_fn([longest] * count)
    if isinstance(loader, DataLoader) and can_choose_rows(loader):
        return lambda count: longest_batch(trainer, loader, count)
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError("the training loader gives no batch: there are no rows to plan for.")
    return lambda count: batch
