"""Counts what the training rows hold, read exactly as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.data.batches.bins import batched, even_rows
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.sft import SFTDataModule
from lightning_lora.data.split import row_lengths, stored_places
from lightning_lora.data.streaming import TokenStream
from lightning_lora.errors import DataError
from lightning_lora.planning.data_counts import DataCounts, without_counts
from lightning_lora.planning.label_counts import count_labels
from lightning_lora.planning.set_up_data import set_up
from lightning_lora.planning.token_rows import TokenChunk, TokenTally, stored_chunks, tally, token_chunk


def count_data(datamodule: LightningDataModule | Any, module: LightningModule | None = None) -> DataCounts:
    """Count the rows and targets of one epoch of training.

    A data module of ours is set up as training does it: with its template, masks, truncation, packing and mixture; of a
    mixture, the first epoch counts. Of any other data module, or a loader, the targets are read from the dataset of its
    training loader (`count_labels`). The data module, its loaders and the random state stay as they are.

    Args:
        datamodule: A data module, or a training loader.
        module: The module that would be trained, whose tokenizer, vocabulary and context length count.

    Raises:
        ConfigError: If the data module refuses its settings, or a row is longer than the context of the model.
        DataError: If a file or a row cannot be used, or if there is no row or no target.
    """
    if not isinstance(datamodule, LightningDataModule):
        return count_labels(datamodule)
    with set_up(datamodule, module) as twin:
        if not isinstance(twin, RowsDataModule):
            return count_labels(twin.train_dataloader())
        return _count_rows(twin) if twin.stream is None else _count_stream(twin, twin.stream)


@dataclass(frozen=True)
class UniqueRows:
    """The different rows of tokens of an epoch.

    Args:
        numbers: The number of the first of each in the dataset, ``(unique rows,)``.
        lengths: Its tokens.
        supervised_tokens: Its trained tokens.
    """

    numbers: numpy.ndarray
    lengths: numpy.ndarray
    supervised_tokens: numpy.ndarray


def unique_rows(datamodule: RowsDataModule) -> UniqueRows:
    """The different training rows of a data module that is set up; of a mixture, those of the first epoch."""
    places, in_epoch = _stored(datamodule)
    found = tally(stored_chunks(datamodule.rows["train"], places))
    numbers = in_epoch[numpy.argsort(places)][found.first]
    return UniqueRows(numbers, found.lengths[found.first], found.supervised_tokens[found.first])


def _stored(datamodule: RowsDataModule) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Where the rows of an epoch are stored, and their numbers in the dataset."""
    rows, mixture = datamodule.rows["train"], getattr(datamodule, "_mixture", None)
    in_epoch = numpy.arange(len(rows)) if mixture is None else mixture.rows(0)
    return numpy.arange(len(rows.data))[stored_places(rows)][in_epoch], in_epoch


def _count_rows(datamodule: RowsDataModule) -> DataCounts:
    places, _ = _stored(datamodule)
    found, statistics = tally(stored_chunks(datamodule.rows["train"], places)), datamodule.statistics["train"]
    counts = _counts(found, statistics.truncated_rows, statistics.dropped_rows)
    return _with_packing(counts, datamodule) if isinstance(datamodule, SFTDataModule) else counts


def _count_stream(datamodule: RowsDataModule, stream: TokenStream) -> DataCounts:
    """The counts of a stream that ends after ``max_rows``; of any other, nothing is known before training."""
    if stream.limit is None:
        return without_counts("tokens", None)
    cut = unsupervised = 0

    def chunks() -> Iterator[TokenChunk]:
        nonlocal cut, unsupervised
        with closing(stream._tables(stream.num_proc)) as tables:
            for table in tables:
                is_good = table["problem"].is_null().to_numpy()
                supervised, weight = table["supervised_tokens"].to_numpy(), table["weight"].to_numpy()
                cut += int((table["length"].to_numpy() > datamodule.max_length).sum())
                unsupervised += int((is_good & (supervised == 0)).sum())
                batch = table.combine_chunks().to_batches()[0]
                yield token_chunk(batch, numpy.flatnonzero((supervised > 0) & (weight > 0)))

    found = tally(chunks())
    if not len(found.lengths):
        raise DataError("train: no row has a supervised token. Raise max_length, or give other rows.")
    return _counts(found, cut, unsupervised)


def _counts(found: TokenTally, truncated: int, unsupervised: int) -> DataCounts:
    return DataCounts(
        unit="tokens",
        rows=len(found.lengths),
        supervised_tokens=int(found.supervised_tokens.sum()),
        unique_supervised_tokens=found.unique_supervised_tokens,
        bits=float(found.unique_supervised_tokens),
        duplicate_rows=len(found.lengths) - len(found.first),
        truncated_rows=truncated,
        unsupervised_rows=unsupervised,
        longest_row=int(found.lengths.max()),
        mean_row=float(found.lengths.mean()),
    )


def _with_packing(counts: DataCounts, datamodule: SFTDataModule) -> DataCounts:
    """The counts with the rows of the first epoch's batches on one device."""
    if not datamodule.packing:
        return counts
    lengths = row_lengths(datamodule.rows["train"], datamodule.max_length)
    sampler = datamodule._sampler(1, 0)
    if datamodule.packing == "length":
        packed = [int(lengths[list(pack)].sum()) for pack in sampler]
    else:
        batches = batched(lengths[list(sampler)].tolist(), datamodule.batch_size)
        packed = [sum(batch[i] for i in row) for batch in batches for row in even_rows(batch)]
    return replace(counts, packed_rows=len(packed), longest_packed_row=max(packed))
