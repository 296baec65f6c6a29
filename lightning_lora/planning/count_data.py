"""Counts what the training rows hold, read exactly as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
from datasets import Dataset
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.data.batches.bins import batched, even_rows
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.sft import SFTDataModule
from lightning_lora.data.split import row_lengths, stored_places

from .data_counts import DataCounts, without_counts
from .label_counts import count_labels
from .set_up_data import set_up
from .token_rows import TokenChunk, compressed_bits, stored_chunks, tally


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
        return _count_stream(twin) if twin.stream is not None else _count_rows(twin)


def training_rows(datamodule: RowsDataModule) -> tuple[Dataset, numpy.ndarray | None]:
    """The rows of tokens of a data module that is set up, and which of them the first epoch has; None for all."""
    mixture = datamodule._mixture if isinstance(datamodule, SFTDataModule) else None
    return datamodule.rows["train"], None if mixture is None else mixture.rows(0)


def _count_rows(datamodule: RowsDataModule) -> DataCounts:
    rows, in_epoch = training_rows(datamodule)
    places = stored_places(rows)
    if in_epoch is not None:
        places = numpy.arange(len(rows.data))[places][in_epoch]

    def chunks() -> Iterator[TokenChunk]:
        return (chunk for chunk, _ in stored_chunks(rows, places) if len(chunk))

    found, statistics = tally(chunks()), datamodule.statistics["train"]
    counts = DataCounts(
        unit="tokens",
        rows=len(found.lengths),
        supervised_tokens=int(found.supervised_tokens.sum()),
        unique_supervised_tokens=found.unique_supervised_tokens,
        bits=float(found.unique_supervised_tokens),
        duplicate_rows=len(found.lengths) - len(found.first),
        truncated_rows=statistics.truncated_rows,
        unsupervised_rows=statistics.dropped_rows,
        longest_row=int(found.lengths.max()),
        mean_row=float(found.lengths.mean()),
        compressed_bits=compressed_bits(chunks, found),
    )
    return _with_packing(counts, datamodule) if isinstance(datamodule, SFTDataModule) else counts


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


def _count_stream(datamodule: RowsDataModule) -> DataCounts:
    return without_counts("tokens", None)
