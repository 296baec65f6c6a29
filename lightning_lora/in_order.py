"""Work shared among threads whose results come in the order of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A few threads, each busy with a piece of work of its own.

    Args:
        pool: Where the work is done.
        num_ahead: How many pieces may wait, done or not, for the results before them to be taken.
    """

    def __init__(self, pool: ThreadPoolExecutor, num_ahead: int) -> None:
        self._pool = pool
        self._num_ahead = num_ahead

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``function(item)`` for each of ``items``, in their order; no more than a few are in memory."""
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                del item
                if len(waiting) > self._num_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def workers() -> Generator[Workers, None, None]:
    """As many workers as torch may use threads.

    Within the context torch itself uses one: a piece is too small to be shared among several.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            yield Workers(pool, 2 * num_threads)
    finally:
        torch.set_num_threads(num_threads)
