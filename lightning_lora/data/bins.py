"""Which examples share a row: arithmetic on their lengths."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each example, in the order given, into the fullest pack that still has room for it, else into a new one.

    Taking examples as they come rather than the longest first keeps all lengths together, so that no optimizer step
    sees long ones only; with the usual lengths far below ``capacity`` it fills packs nearly as well.

    Args:
        lengths: Tokens of each example, at most ``capacity``.
        capacity: Tokens of a pack.

    >>> best_fit([5, 6, 4, 2, 3], capacity=10)
    [[0, 3, 4], [1, 2]]
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: tokens left in a pack, and which
    for example, length in enumerate(lengths):
        fitting = bisect_left(room, (length, -1))
        left, pack = room.pop(fitting) if fitting < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(example)
        insort(room, (left - length, pack))
    return packs


def even_rows(lengths: Sequence[int]) -> list[list[int]]:
    """All examples in few rows of nearly the same length, twice the longest example or so at most.

    Longer rows would leave a little less padding, but where attention is a matrix over the row, its cost per token
    grows with the row's length. Of up to twice as many rows as needed, the number with the fewest places is taken.

    >>> even_rows([8, 5, 3, 2, 2])
    [[0, 3], [1, 2, 4]]
    """
    fewest = -(-sum(lengths) // (2 * max(lengths)))
    candidates = [_evenly(lengths, num_rows) for num_rows in range(fewest, min(2 * fewest, len(lengths)) + 1)]
    return min(candidates, key=lambda rows: len(rows) * max(sum(lengths[i] for i in row) for row in rows))


def _evenly(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """The longest example first, each into the row that is emptiest."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    emptiest = [(0, row) for row in range(num_rows)]
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        used, row = heapq.heappop(emptiest)
        rows[row].append(example)
        heapq.heappush(emptiest, (used + lengths[example], row))
    return [sorted(row) for row in rows]


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """The lengths of each batch."""
    return (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))


def filled(rows: Iterable[Sequence[int]]) -> float:
    """Share of the places that hold tokens when each batch is padded to its longest row.

    Args:
        rows: For each batch the tokens of its rows.

    >>> filled([[1, 4], [5]])
    0.7692307692307693
    """
    counted = [(sum(batch), len(batch) * max(batch)) for batch in rows]
    return sum(tokens for tokens, _ in counted) / sum(places for _, places in counted)
