"""Batches of rows in rounds, as many as fit into a time: how long a row takes is known only when some have run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from tqdm import tqdm

BATCH_TOKENS = 8192
"""Most tokens of a batch, padding included; a longer row is a batch of its own."""
_FIRST, _GROWTH, _CAUTION = 2, 8, 0.8


class Rounds:
    """Gives batches of the first rows of a list until all have run, or a time is over; it is gone through once.

    Each round has eight times as many rows as all before it, or as many as the time that is left allows by what the
    tokens so far took. So the rows that ran are the first of the list: of a list in random order, a random sample. The
    first two always run. Within a round, rows of similar length share a batch.

    Args:
        rows: The rows, by number.
        chosen: Numbers of rows, ``(rows,)``.
        lengths: Tokens of each chosen row, ``(rows,)``; None gives each row a batch of its own.
        collate: Makes a batch of some rows.
        seconds: The time, from the first batch on.
        clock: Gives seconds.

    Attributes:
        done: The number of rows that ran.
    """

    def __init__(
        self,
        rows: Any,
        chosen: numpy.ndarray,
        lengths: numpy.ndarray | None,
        collate: Callable[[list[Any]], Any],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rows, self.chosen, self.collate = rows, chosen, collate
        self.seconds, self.clock, self.done = seconds, clock, 0
        self._sizes = numpy.ones(len(chosen), dtype=numpy.int64) if lengths is None else lengths
        self._batch_size = 1 if lengths is None else BATCH_TOKENS

    def __len__(self) -> int:
        """The most batches that there can be: with a length, a Trainer asks for a batch when the last one has run."""
        return len(self.chosen)

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        if not sys.stderr.isatty():
            print(self, file=sys.stderr)
        spent = 0.0
        with tqdm(total=len(self.chosen), desc=str(self), unit=" rows", leave=False, disable=None) as bar:
            while self.done < (end := self._end(spent)):
                for part in self._batches(self.done, end):
                    begun = self.clock()
                    yield self.collate([self.rows[row] for row in self.chosen[part].tolist()])
                    if torch.accelerator.is_available():
                        torch.accelerator.synchronize()
                    spent += self.clock() - begun
                    bar.update(len(part))
                self.done = end

    def __str__(self) -> str:
        return f"running the base on up to {len(self.chosen):,} rows, for at most {self.seconds:.0f} seconds"

    def _end(self, spent: float) -> int:
        """The end of the next round."""
        if not self.done:
            return min(_FIRST, len(self.chosen))
        tokens = numpy.cumsum(self._sizes)
        of_token = spent / tokens[self.done - 1]
        left = (self.seconds - spent) * _CAUTION / max(of_token, 1e-12)
        fit = int(numpy.searchsorted(tokens, tokens[self.done - 1] + left, side="right"))
        return min(len(self.chosen), (1 + _GROWTH) * self.done, fit)

    def _batches(self, start: int, end: int) -> Iterator[numpy.ndarray]:
        """Places of rows of similar length, for each batch."""
        order = start + numpy.argsort(self._sizes[start:end], kind="stable")
        first = 0
        for last in range(1, len(order) + 1):
            if last == len(order) or self._sizes[order[last]] * (last + 1 - first) > self._batch_size:
                yield order[first:last]
                first = last
