"""The batch of training rows that needs the most memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_lora.batch.trial_step import can_choose_rows, longest_batch
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.split import row_lengths
from lightning_lora.errors import DataError


def largest_batches(data: LightningDataModule, loader: Any) -> Callable[[int], Any]:
    """A function from a number of rows to the batch of so many rows that needs the most memory.

    A padded batch is as long as its longest row, and the longest row comes in some batch of every epoch. Of rows that
    are no token sequences, the longest are searched among the first 1,000.

    Raises:
        DataError: If the loader gives no batch.
    """
    if isinstance(data, RowsDataModule) and "train" in data.rows and not getattr(data, "packing", False):
        lengths = row_lengths(data.rows["train"], data.max_length)
        rows_each = len(lengths) // len(loader.dataset)  # 2 of a pair
        longest = loader.dataset[int(numpy.argmax(lengths)) // rows_each]
        return lambda count: loader.collate_fn([longest] * count)
    if isinstance(loader, DataLoader) and can_choose_rows(loader) and data.trainer is not None:
        trainer = data.trainer
        return lambda count: longest_batch(trainer, loader, count)
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError("the training loader gives no batch: there are no rows to plan for.")
    return lambda count: batch
