"""Which rows a run would train on next."""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_lora.effective_batch import loader_batch_size
from lightning_lora.errors import DataError


def check_rows(loader: object, what: str) -> DataLoader[Any]:
    """``loader`` itself, if single rows can be taken of its dataset.

    Raises:
        DataError: If not.
    """
    advice = "a probe takes single rows: give one DataLoader over a dataset with a length."
    if not isinstance(loader, DataLoader):
        raise DataError(f"the {what} data are a {type(loader).__name__}; {advice}")
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise DataError(f"the {what} data are an iterable dataset ({type(loader.dataset).__name__}); {advice}")
    if loader.batch_size is None and type(loader.batch_sampler) is not BatchSampler:
        kind = type(loader.batch_sampler).__name__ if loader.batch_sampler is not None else "a dataset of batches"
        raise DataError(f"the {what} batches are made by {kind}; {advice}")
    return loader


def rows_of_batch(loader: DataLoader[Any]) -> int:
    """Rows of a batch of a loader that `check_rows` has passed."""
    rows = loader_batch_size(loader)
    assert rows is not None
    return rows


def next_rows(loader: DataLoader[Any], epoch: int = 0, num_batches: int = 0) -> list[Any]:
    """What the dataset of ``loader`` will be asked for from here on, once each; what this epoch has used comes last.

    That is known of samplers that draw from nothing but their seed and the epoch, as `SFTDataModule` has. The order of
    others is drawn when an epoch begins, and cannot be asked for again: then it is one of a fixed seed.

    Args:
        loader: Of the run, as `check_rows` has passed it.
        epoch: The one it is in, from 0.
        num_batches: Batches of this epoch that were trained on.
    """
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if not isinstance(sampler, (SequentialSampler, DistributedSampler)):
        count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    if isinstance(sampler, DistributedSampler):
        sampler = copy.copy(sampler)
        sampler.set_epoch(epoch)
    order = list(sampler)
    place = min(num_batches * rows_of_batch(loader), len(order))
    return [*order[place:], *order[:place]]
