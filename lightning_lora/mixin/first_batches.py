"""The first training batches of a run, read before it without changing what it will read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain, islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.checkpoints.loader_position import generators, keeps_position
from lightning_lora.checkpoints.random_state import kept_random_state, set_run_random_state
from lightning_lora.errors import ConfigError
from lightning_lora.lightning_private import training_fetcher


def first_batches(trainer: Trainer, count: int, before_iterators: dict[str, Any] | None) -> list[Any]:
    """The first ``count`` training batches of this rank, or all if there are fewer, as the loader makes them.

    Rows of a dataset that is read by number are read twice, and all random numbers stay as they are. A stream is read
    once: its first batches are kept, and handed out again when training asks for them.

    Args:
        trainer: The Trainer, whose training is about to start.
        count: Number of batches, at least 1.
        before_iterators: The `random_state` from which workers have drawn the order of the first epoch.

    Raises:
        ConfigError: If ``training_step`` fetches its batches itself.
    """
    fetcher, loader = training_fetcher(trainer), trainer.train_dataloader
    assert fetcher is not None
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        raise ConfigError("training_step takes dataloader_iter, and its batches cannot be read before it.")
    count = int(min(count, trainer.num_training_batches))
    if _can_be_read_again(loader):
        return _read_again(trainer, loader, count, before_iterators)
    # Lightning has fetched one of a stream already.
    fetched = list(getattr(fetcher, "batches", ()))
    taken = list(islice(fetcher.iterator or (), max(0, count - len(fetched))))
    fetcher.iterator = chain(taken, fetcher.iterator or ())
    return [batch for batch, _, _ in (fetched + taken)[:count]]


def _can_be_read_again(loader: Any) -> bool:
    is_by_number = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return is_by_number and not keeps_position(loader)


def _read_again(
    trainer: Trainer, loader: DataLoader[Any], count: int, before_iterators: dict[str, Any] | None
) -> list[Any]:
    alike = copy.copy(loader)
    has_workers = loader.num_workers > 0
    # In this process: new workers would take longer to start than these batches to read.
    alone: Mapping[str, Any] = {
        "num_workers": 0,
        "prefetch_factor": None,
        "persistent_workers": False,
        "timeout": 0,
        "_iterator": None,
    }
    alike.__dict__.update(alone)
    with kept_random_state(trainer.strategy.root_device, generators([loader])):
        if has_workers and before_iterators is not None:
            set_run_random_state(before_iterators, trainer)
            return list(islice(iter(alike), count))
        with kept_random_state(trainer.strategy.root_device, generators([loader])):
            # Draws a number, as the iterator that Lightning has made already did.
            batches = iter(alike)
        return list(islice(batches, count))
