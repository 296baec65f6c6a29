"""Counts of rows of tokens: how many are trained on, which rows repeat another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import pyarrow
from datasets import Dataset


@dataclass(frozen=True)
class TokenChunk:
    """Some rows of tokens that lie one after another in memory.

    Args:
        ids: Token ids of all rows, ``(tokens,)``, int32.
        supervised: Whether each token is trained on, ``(tokens,)``.
        starts: Where each row begins, ``(rows,)``.
        ends: Where each row ends, ``(rows,)``.
    """

    ids: numpy.ndarray
    supervised: numpy.ndarray
    starts: numpy.ndarray
    ends: numpy.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def supervised_tokens(self) -> numpy.ndarray:
        """The number of trained tokens of each row, ``(rows,)``."""
        before = numpy.concatenate([[0], numpy.cumsum(self.supervised)])
        return before[self.ends] - before[self.starts]

    def digests(self) -> numpy.ndarray:
        """A 64-bit hash of the ids and the mask of each row, ``(rows,)``."""
        content = memoryview((self.ids.astype(numpy.int64) * 2 + self.supervised).tobytes())
        hashes = (
            hashlib.blake2b(content[8 * start : 8 * end], digest_size=8).digest()
            for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        )
        return numpy.frombuffer(b"".join(hashes), dtype=numpy.uint64)


def stored_chunks(rows: Dataset, places: numpy.ndarray) -> Iterator[TokenChunk]:
    """Rows of a dataset, in the order in which they are stored.

    Args:
        rows: A dataset with the columns ``input_ids`` and ``supervised``.
        places: Which rows of its table are meant, ``(rows,)``.
    """
    table = rows.data.table
    is_meant = numpy.zeros(len(table), dtype=bool)
    is_meant[places] = True
    start = 0
    for batch in table.select(["input_ids", "supervised"]).to_batches():
        yield token_chunk(batch, numpy.flatnonzero(is_meant[start : start + len(batch)]))
        start += len(batch)


def token_chunk(batch: pyarrow.RecordBatch, rows: numpy.ndarray) -> TokenChunk:
    """Some rows of a batch with the columns ``input_ids`` and ``supervised``."""
    ids, supervised = batch.column("input_ids"), batch.column("supervised")
    offsets = ids.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    mask_start = int(supervised.offsets.to_numpy()[0])
    mask = supervised.values.slice(mask_start, last - first).to_numpy(zero_copy_only=False)
    offsets = offsets - first
    values = ids.values.slice(first, last - first).to_numpy()
    return TokenChunk(values, mask, offsets[:-1][rows], offsets[1:][rows])


@dataclass(frozen=True)
class TokenTally:
    """What was found in all chunks.

    Args:
        supervised_tokens: Trained tokens of each row, ``(rows,)``.
        first: Index of the first occurrence of each different row, ``(unique rows,)``, rising.
    """

    supervised_tokens: numpy.ndarray
    lengths: numpy.ndarray
    first: numpy.ndarray

    @property
    def unique_supervised_tokens(self) -> int:
        """Trained tokens of all different rows."""
        return int(self.supervised_tokens[self.first].sum())


def tally(chunks: Iterator[TokenChunk]) -> TokenTally:
    """Count the rows of all chunks; some 24 bytes of memory for each row."""
    nothing = numpy.zeros(0, dtype=numpy.int64)
    supervised, lengths, digests = [nothing], [nothing], [nothing.view(numpy.uint64)]
    for chunk in chunks:
        supervised.append(chunk.supervised_tokens())
        lengths.append(chunk.ends - chunk.starts)
        digests.append(chunk.digests())
    _, first = numpy.unique(numpy.concatenate(digests), return_index=True)
    return TokenTally(numpy.concatenate(supervised), numpy.concatenate(lengths), numpy.sort(first))
