"""Going on in the middle of an epoch by passing over indices, without reading the rows behind them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


class _Skipping:
    """What a sampler draws, without its first ``skip`` draws the first time."""

    def __init__(self, indices: Any, skip: int) -> None:
        self.indices = indices
        self.skip = skip
        self.latest: _Late | None = None

    def __iter__(self) -> _Late:
        self.latest = _Late(self)
        return self.latest

    def __len__(self) -> int:
        return len(self.indices)


class _Late(Iterator[Any]):
    """Passes over indices not before it is started: most samplers are generators and draw their seed there."""

    def __init__(self, source: _Skipping) -> None:
        self.source = source
        self.indices: Iterator[Any] = iter(source.indices)
        self.is_started = False

    def start(self) -> None:
        if not self.is_started:
            # Iterators with workers that persist keep their sampler and ask it again in the next epoch.
            skip, self.source.skip, self.is_started = self.source.skip, 0, True
            for _ in islice(self.indices, skip):
                pass

    def __next__(self) -> Any:
        self.start()
        return next(self.indices)


def keeps_position(loader: object) -> bool:
    """Whether ``loader`` saves its own position, as torchdata's ``StatefulDataLoader``; Lightning then asks it."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def generators(loaders: Iterable[object]) -> list[torch.Generator]:
    """Generators that ``loaders`` and their samplers draw from instead of the global one, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and generator is not torch.default_generator:
                found[id(generator)] = generator
    return list(found.values())


def obstacle(loader: object, skip: int) -> str | None:
    """Why `starting_at` cannot place ``loader`` behind its first ``skip`` batches; None if it can."""
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"a {kind} starts from its beginning"
    if isinstance(loader.dataset, IterableDataset):
        return f"the rows of an iterable dataset ({type(loader.dataset).__name__}) start from their beginning"
    if skip > len(loader):
        return f"a {kind} of {len(loader)} batches has begun again within the epoch"
    return None


@contextmanager
def starting_at(loaders: Sequence[DataLoader[Any]], skip: int) -> Iterator[Callable[[], None]]:
    """Within this context, iterators made of ``loaders`` begin behind their first ``skip`` batches.

    A sampler of a user's own is asked for the skipped indices too, so that it draws what it would have drawn.

    Args:
        loaders: Loaders without an `obstacle`.
        skip: Batches of the epoch that have been trained on.

    Yields:
        Passes over the indices now, where nothing has asked for the next one yet.
    """
    # torch refuses to assign these, lest an iterator in use and its loader disagree; here none outlives the context.
    names = ["sampler" if loader.batch_sampler is None else "batch_sampler" for loader in loaders]
    samplers = [getattr(loader, name) for loader, name in zip(loaders, names, strict=True)]
    skipping = [_Skipping(sampler, skip) for sampler in samplers]

    def start() -> None:
        for each in skipping:
            if each.latest is not None:
                each.latest.start()

    try:
        for loader, name, each in zip(loaders, names, skipping, strict=True):
            loader.__dict__[name] = each
            if loader._iterator is not None:
                # Workers that persist belong to an iterator with a sampler of its own, which is begun again.
                loader._iterator._index_sampler = each
        yield start
    finally:
        for loader, name, sampler in zip(loaders, names, samplers, strict=True):
            loader.__dict__[name] = sampler
