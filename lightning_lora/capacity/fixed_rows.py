"""Rows that every measurement of a run uses, so that measurements can be compared in pairs, and where they are from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_lora.batch.counting import count_rows
from lightning_lora.checkpoints.loader_position import generators
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.effective_batch import loader_batch_size


def fixed_batches(loaders: Any, num_rows: int, device: torch.device) -> list[Any] | None:
    """Batches of rows spread evenly over a dataset, as its loader makes them; None if rows cannot be chosen.

    The position of the loader, its workers and all random numbers stay as they are.

    Args:
        loaders: A loader, or a list whose first loader counts.
        num_rows: Number of rows to take; all if there are fewer.
        device: The device whose random numbers stay as they are.
    """
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if not isinstance(loader.dataset, Sized) or not len(loader.dataset):
        return None
    with kept_random_state(device, generators([loader])):
        torch.manual_seed(0)
        batches = []
        for indices in islice(_indices(loader, num_rows), num_rows):
            batches.append(_batch(loader, indices))
            if sum(map(count_rows, batches)) >= num_rows:
                break
    return batches or None


def _indices(loader: DataLoader[Any], num_rows: int) -> Iterator[Sequence[int]]:
    sampler, size = loader.batch_sampler, loader_batch_size(loader)
    if sampler is not None and type(sampler) is not BatchSampler:
        yield from sampler  # it chooses which rows go together, as packing does
        return
    count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    number = min(count, num_rows)
    places = [place * count // number for place in range(number)]
    if sampler is None:
        yield from ([place] for place in places)  # a dataset of batches
        return
    size = size or 1
    yield from (places[start : start + size] for start in range(0, number, size))


def _batch(loader: DataLoader[Any], indices: Sequence[int]) -> Any:
    dataset = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[indices[0]])
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__(list(indices)))  # pyright: ignore[reportAttributeAccessIssue]
    return loader.collate_fn([dataset[index] for index in indices])


def validation_loaders(trainer: Trainer) -> Any:
    """The validation loaders of a run, made now if it has none yet; random numbers go on as if nothing had been made.

    Lightning makes them in the first epoch that ends with a validation.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:
        with kept_random_state(trainer.strategy.root_device):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
    return trainer.val_dataloaders
