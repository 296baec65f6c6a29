"""Finds the rows that a run would train on next, in their order."""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_lora.effective_batch import loader_batch_size
from lightning_lora.errors import ResultFileError


def check_loader(loader: object, kind: str) -> DataLoader[Any]:
    """Return ``loader`` if single rows can be taken from its dataset.

    Raises:
        DataError: If single rows cannot be taken.
    """
    advice = "a probe takes single rows: give one DataLoader over a dataset with a length."
    if not isinstance(loader, DataLoader):
        raise ResultFileError(f"the {kind} data are a {type(loader).__name__}; {advice}")
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise ResultFileError(f"the {kind} data are an iterable dataset ({type(loader.dataset).__name__}); {advice}")
    if loader.batch_size is None and type(loader.batch_sampler) is not BatchSampler:
        maker = type(loader.batch_sampler).__name__ if loader.batch_sampler is not None else "a dataset of batches"
        raise ResultFileError(f"the {kind} batches are made by {maker}; {advice}")
    return loader


def rows_per_batch(loader: DataLoader[Any]) -> int:
    """Rows of a batch of a loader that passed `check_loader`."""
    rows = loader_batch_size(loader)
    assert rows is not None
    return rows


def next_rows(loader: DataLoader[Any], epoch: int = 0, num_batches: int = 0) -> list[Any]:
    """All indices of the dataset, starting with those the run would train on next; those used in this epoch come last.

    The order is known for samplers that depend on their seed and the epoch only, as that of `SFTDataModule` does. Other
    samplers draw the order when an epoch begins and cannot draw it again; they are replaced by a fixed random order.

    Args:
        loader: The training loader, which passed `check_loader`.
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
    place = min(num_batches * rows_per_batch(loader), len(order))
    return [*order[place:], *order[:place]]
