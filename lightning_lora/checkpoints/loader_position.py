"""Start loaders in the middle of an epoch: skip the indices already used, without reading their rows again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, IterableDataset


class _SkippingSampler:
    """Draws from ``sampler``; the first iterator that is used drops the first ``skip`` draws."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip
        self.latest: _SkippingIterator | None = None

    def __iter__(self) -> _SkippingIterator:
        self.latest = _SkippingIterator(self)
        return self.latest

    def __len__(self) -> int:
        return len(self.sampler)


class _SkippingIterator(Iterator[Any]):
    """Skips as late as possible: most samplers are generators, which draw their seed at the first ``next``."""

    def __init__(self, owner: _SkippingSampler) -> None:
        self.owner = owner
        self.indices: Iterator[Any] = iter(owner.sampler)
        self.is_started = False

    def start(self) -> None:
        if not self.is_started:
            # An iterator with persistent workers keeps its sampler and iterates over it again in the next epoch.
            skip, self.owner.skip, self.is_started = self.owner.skip, 0, True
            for _ in islice(self.indices, skip):
                pass

    def __next__(self) -> Any:
        self.start()
        return next(self.indices)


def keeps_position(loader: object) -> bool:
    """Whether ``loader`` saves its own position, as torchdata's ``StatefulDataLoader`` does; Lightning then asks it."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def generators(loaders: Iterable[object]) -> list[torch.Generator]:
    """Generators that ``loaders`` and their samplers use instead of torch's global one, without duplicates."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and generator is not torch.default_generator:
                found[id(generator)] = generator
    return list(found.values())


def without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same rows in the same order that reads in this process; iterators of ``loader`` go on."""
    alike = copy.copy(loader)
    settings = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
    alike.__dict__.update(settings | {"_iterator": None})
    return alike


def obstacle(loader: object, num_batches: int) -> str | None:
    """Reason why `starting_after` cannot skip ``num_batches`` batches of ``loader``; None if it can."""
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"a {kind} starts from its beginning"
    if isinstance(loader.dataset, IterableDataset):
        return f"the rows of an iterable dataset ({type(loader.dataset).__name__}) start from their beginning"
    length = sized_len(loader)  # None for a stream of rows
    if length is not None and num_batches > length:
        return f"a {kind} of {length} batches has begun again within the epoch"
    return None


@contextmanager
def starting_after(num_batches: int, loaders: Sequence[DataLoader[Any]]) -> Iterator[Callable[[], None]]:
    """Inside this context, new iterators of ``loaders`` start after the first ``num_batches`` batches.

    A user's own sampler still draws the skipped indices, so that its random numbers stay the same.

    Args:
        loaders: Loaders without an `obstacle`.

    Yields:
        A function that skips the indices now, for iterators from which no batch was requested yet.
    """
    # torch refuses to assign a sampler, because an iterator in use would disagree with its loader. Here no iterator
    # is in use, and the old samplers are back when the context ends.
    names = ["sampler" if loader.batch_sampler is None else "batch_sampler" for loader in loaders]
    samplers = [getattr(loader, name) for loader, name in zip(loaders, names, strict=True)]
    skipping = [_SkippingSampler(sampler, num_batches) for sampler in samplers]

    def skip_now() -> None:
        for each in skipping:
            if each.latest is not None:
                each.latest.start()

    try:
        for loader, name, each in zip(loaders, names, skipping, strict=True):
            loader.__dict__[name] = each
            if loader._iterator is not None:
                # The iterator of persistent workers has its own reference to the sampler and is reused.
                loader._iterator._index_sampler = each
        yield skip_now
    finally:
        for loader, name, sampler in zip(loaders, names, samplers, strict=True):
            loader.__dict__[name] = sampler
