"""Several sources mixed by shares: how many rows of each an epoch has, and which."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_lora.errors import DataError, DataSettingError

Shares = dict[str, Fraction]
"""The share of each source in the rows of an epoch; all of them add up to 1."""

_EXAMPLE = "{a.jsonl: 0.7, b.jsonl: 0.3}"


def read_shares(train: Any) -> Shares | None:
    """The shares of the sources, or None if they are named without shares.

    Raises:
        ConfigError: If a share is not a positive number.
    """
    if isinstance(train, str) and train.startswith("{"):
        raise DataSettingError(f"train must be names, or names with numbers as in {_EXAMPLE}; got {train}.")
    if isinstance(train, (list, tuple)) and not all(isinstance(name, (str, os.PathLike)) for name in train):
        raise DataSettingError(f"a list of train holds names; give names with shares as in {_EXAMPLE}, got {train!r}.")
    if not isinstance(train, Mapping):
        return None
    if not train:
        raise DataSettingError(f"train is empty; name at least one source, as in {_EXAMPLE}.")
    for name, share in train.items():
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not is_number or not 0 < share < math.inf:
            raise DataSettingError(f"train: the share of {name!r} must be a positive number, got {share!r}.")
    # As written: 0.7 and 0.3 of 10 rows are 7 and 3, which no float is.
    given = {os.fspath(name): Fraction(str(share)) for name, share in train.items()}
    return {name: share / sum(given.values()) for name, share in given.items()}


class Mixture:
    """The rows of each epoch if sources are mixed by shares.

    An epoch ends before a row would be needed twice: it is as long as the source that runs out first allows. In the
    next epoch, each source goes on with other rows, so that after any number of epochs two rows of one source have
    been used equally often, or one of them once more. Which rows an epoch has depends on ``seed`` and the epoch only.

    The rows of a source are ordered by length and divided into as many runs as an epoch needs rows; an epoch takes one
    row of each run. So the lengths are nearly the same in all epochs, and rows can be packed once for all of them.

    Args:
        lengths: Tokens of each row, ``(rows,)``.
        sources: Index of the source of each row, ``(rows,)``.
        shares: The share of each source.
        limit: Most rows in an epoch; None for no limit.
        seed: Decides which of the rows of equal length come first.

    Attributes:
        counts: Rows of each source in an epoch.
        lengths: The most tokens that each row of an epoch has in any epoch, ``(rows of an epoch,)``.

    Raises:
        DataError: If a source has no row.
        ConfigError: If an epoch would have no row of a source.
    """

    def __init__(
        self, lengths: numpy.ndarray, sources: numpy.ndarray, shares: Shares, limit: int | None, seed: int
    ) -> None:
        available = numpy.bincount(sources, minlength=len(shares)).tolist()
        if 0 in available:
            raise DataError(f"train: no row of {list(shares)[available.index(0)]!r} can be trained on; leave it out.")
        generator = numpy.random.default_rng(seed)
        shuffled = generator.permutation(len(lengths))
        by_length = shuffled[numpy.argsort(lengths[shuffled], kind="stable")]
        self._rows = [by_length[sources[by_length] == source] for source in range(len(shares))]
        self._starts = [int(generator.integers(len(rows))) for rows in self._rows]
        self.counts = _counts(available, shares, limit)
        longest = [
            rows[-(-(numpy.arange(1, count + 1) * len(rows)) // count) - 1]
            for rows, count in zip(self._rows, self.counts, strict=True)
        ]
        self.lengths: numpy.ndarray = lengths[numpy.concatenate(longest)]

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, epoch: int) -> numpy.ndarray:
        """The rows of an epoch, ``(rows of an epoch,)``; each is at most as long as ``lengths`` says."""
        return numpy.concatenate(
            [
                # Systematic sampling: the rows that lie (rows / count) apart, from a place that moves on by one row
                # each epoch and so comes to every row before it comes to one again.
                rows[((start + epoch * count) % len(rows) + numpy.arange(count) * len(rows)) // count]
                for rows, start, count in zip(self._rows, self._starts, self.counts, strict=True)
            ]
        )


def _counts(available: list[int], shares: Shares, limit: int | None) -> list[int]:
    """Rows of each source in an epoch: its share of the whole, rounded so that they add up."""
    total = min(math.floor(rows / share) for rows, share in zip(available, shares.values(), strict=True))
    total = total if limit is None else min(total, limit)
    exact = [share * total for share in shares.values()]
    counts = [math.floor(count) for count in exact]
    by_rest = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_rest[: total - sum(counts)]:
        counts[source] += 1
    for name, share, count in zip(shares, shares.values(), counts, strict=True):
        if not count:
            raise DataSettingError(
                f"train: {float(share):.2%} of an epoch of {total} rows is no row of {name!r}; give it a larger share, "
                "or the other sources more rows."
            )
    return counts


class MixtureSampler(DistributedSampler[Any]):
    """Shuffles the rows that a mixture has in each epoch and distributes them over the devices.

    Args:
        mixture: Chooses the rows.
        seed: Decides the order, together with the epoch.
        num_replicas: Number of devices that share the rows.
        rank: Index of this device.
    """

    def __init__(self, mixture: Mixture, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(range(len(mixture)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.mixture = mixture

    @override
    def __iter__(self) -> Iterator[int]:
        """Iterate over the rows of this device in the current epoch."""
        return iter(self.mixture.rows(self.epoch)[list(super().__iter__())].tolist())
