"""Bin packing on the lengths of examples: which of them share a row."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign each example, in the order given, to the fullest pack that has room for it, or to a new pack.

    Examples are not sorted by length, so that packs mix all lengths and no optimizer step sees long examples only. If
    most lengths are far below ``capacity``, packs are filled nearly as well as with sorting.

    Args:
        lengths: Tokens of each example, at most ``capacity``.
        capacity: Most tokens in a pack.

    Returns:
        The indices of the examples in each pack.

    >>> best_fit([5, 6, 4, 2, 3], capacity=10)
    [[0, 3, 4], [1, 2]]
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left in a pack, index of the pack), sorted
    for example, length in enumerate(lengths):
        fitting = bisect_left(room, (length, -1))
        left, pack = room.pop(fitting) if fitting < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(example)
        insort(room, (left - length, pack))
    return packs


def even_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute all examples over a few rows of nearly equal length, at most about twice the longest example.

    Longer rows would need a little less padding, but if attention computes a matrix over the row, its cost per token
    grows with the length of the row. All numbers of rows from the fewest to twice as many are tried, and the one with
    the fewest tokens, padding included, is used.

    Args:
        lengths: Tokens of each example.

    Returns:
        The indices of the examples in each row.

    >>> even_rows([8, 5, 3, 2, 2])
    [[0, 3], [1, 2, 4]]
    """
    fewest = -(-sum(lengths) // (2 * max(lengths)))
    candidates = [_spread_over(lengths, num_rows) for num_rows in range(fewest, min(2 * fewest, len(lengths)) + 1)]
    return min(candidates, key=lambda rows: len(rows) * max(sum(lengths[i] for i in row) for row in rows))


def _spread_over(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Assign each example, longest first, to the row with the fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    emptiest = [(0, row) for row in range(num_rows)]
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        used, row = heapq.heappop(emptiest)
        rows[row].append(example)
        heapq.heappush(emptiest, (used + lengths[example], row))
    return [sorted(row) for row in rows]


def batched(lengths: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Split lengths into batches, the last of which may be short."""
    return [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]


def filled_share(batches: Sequence[Sequence[int]]) -> float:
    """Share of the positions that hold tokens if each batch is padded to its longest row.

    Args:
        batches: The number of tokens of each row, for each batch.

    >>> filled_share([[1, 4], [5]])
    0.7692307692307693
    """
    return sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)
