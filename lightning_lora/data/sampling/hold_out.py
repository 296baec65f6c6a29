"""Conversations of the training rows that are held out for validation, and rows that are on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.data.split import column, stored_places
from lightning_lora.errors import DataError


def hold_out(rows: Dataset, share: float, seed: int) -> numpy.ndarray:
    """Choose conversations that are held out, by their tokens and ``seed``.

    All rows of a conversation stay on one side, and so do conversations that have a row with the same tokens. More
    rows in the files change the choice among the present ones little.

    Args:
        rows: Rows of tokens with the columns ``input_ids`` and ``conversation``.
        share: Share of the conversations to hold out; at least one is, and at least one is left.
        seed: Decides which ones.

    Returns:
        Whether each row is held out, ``(rows,)``.

    Raises:
        DataError: If the rows cannot be divided.
    """
    numbers = numpy.unique(column(rows, "conversation"), return_inverse=True)[1]
    keys = numpy.array(list(_keys(rows, seed)), dtype=object)[stored_places(rows)].tolist()
    groups = _alike(numbers.tolist(), keys)
    sizes = Counter(groups)
    smallest_keys: dict[int, bytes] = {}
    for number, key in zip(numbers.tolist(), keys, strict=True):
        group = groups[number]
        smallest_keys[group] = min(key, smallest_keys.get(group, key))
    wanted = min(max(round(share * len(groups)), 1), len(groups) - 1)
    held: set[int] = set()
    for group in sorted(sizes, key=smallest_keys.__getitem__):
        if sizes[group] <= wanted:
            held.add(group)
            wanted -= sizes[group]
    if not held:
        raise DataError(
            f"train: nothing can be held out for validation of {len(groups)} conversation(s), "
            f"{max(sizes.values())} of which are the same: give validation= rows of their own."
        )
    return numpy.isin(numpy.array(groups)[numbers], list(held))


def tell_shared(train: Dataset, validation: Dataset) -> None:
    """Tell of validation rows that are trained on, token for token."""
    seen, keys = (
        numpy.array(list(_keys(rows, seed=0)), dtype=object)[stored_places(rows)] for rows in (train, validation)
    )
    known = set(seen)
    shared = sum(key in known for key in keys)
    if shared:
        rank_zero_info(
            f"validation: {shared} of {len(validation)} rows are training rows too, token for token; what they measure "
            "is memory. Give other rows, or validation_share in place of validation."
        )


def _alike(numbers: list[int], keys: list[bytes]) -> list[int]:
    """A group for each conversation; conversations with a row in common are in one group."""
    parents = list(range(max(numbers) + 1))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    first: dict[bytes, int] = {}
    for number, key in zip(numbers, keys, strict=True):
        parents[root(number)] = root(first.setdefault(key, number))
    return [root(number) for number in range(len(parents))]


def _keys(rows: Dataset, seed: int) -> Iterator[bytes]:
    """A hash of the tokens of each stored row that depends on the seed."""
    salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    chunks: list[Any] = rows.data.column("input_ids").chunks
    for lists in filter(len, chunks):
        ends = numpy.cumsum(lists.value_lengths().to_numpy())
        tokens = lists.flatten().to_numpy()
        for row in numpy.split(tokens, ends[:-1]):
            yield hashlib.blake2b(row.tobytes(), digest_size=16, key=salt).digest()
