"""The first training batches of a run, read before it without changing what it will read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.checkpoints.loader_position import generators, keeps_position, without_workers
from lightning_lora.checkpoints.random_state import kept_random_state, set_run_random_state
from lightning_lora.errors import RankChangeError
from lightning_lora.lightning_private import training_fetcher


def first_batches(trainer: Trainer, count: int, before_iterators: dict[str, Any] | None) -> list[Any]:
    """The first ``count`` training batches of this rank, or all if there are fewer, as the loader makes them.

    Rows of a dataset that is read by number are read twice, and all random numbers stay as they are. A stream is read
    once: its first batches are kept, and handed out again when training asks for them.

    Args:
        count: Number of batches, at least 1.
        before_iterators: The `random_state` from which workers have drawn the order of the first epoch.

    Raises:
        ConfigError: If ``training_step`` fetches its batches itself.
    """
    fetcher: Any = training_fetcher(trainer)
    loader: Any = trainer.train_dataloader
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        raise RankChangeError("training_step takes dataloader_iter, and its batches cannot be read before it.")
    count = int(min(count, trainer.num_training_batches))
    if (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and not keeps_position(loader)
    ):
        return _read_again(trainer, loader, count, before_iterators)
    # Lightning has fetched one of a stream already.
    fetched: list[Any] = list(getattr(fetcher, "batches", ()))
    coming = _rest(fetcher.iterator)
    taken = list(islice(coming, max(0, count - len(fetched))))
    fetcher.iterator = chain(taken, coming)
    return [batch for batch, _, _ in (fetched + taken)[:count]]


def _rest(iterator: Any) -> Iterator[Any]:
    """What ``iterator`` has not given yet; Lightning's begins again where it is iterated over."""
    while (item := next(iterator, None)) is not None:
        yield item


def _read_again(
    trainer: Trainer, loader: DataLoader[Any], count: int, before_iterators: dict[str, Any] | None
) -> list[Any]:
    # New workers would take longer to start than these batches to read.
    alike = without_workers(loader)
    with kept_random_state(trainer.strategy.root_device, generators([loader])):
        if loader.num_workers and before_iterators is not None:
            set_run_random_state(before_iterators, trainer)
            return list(islice(iter(alike), count))
        with kept_random_state(trainer.strategy.root_device, generators([loader])):
            # Draws a number, as the iterator that Lightning has made already did.
            batches = iter(alike)
        return list(islice(batches, count))
