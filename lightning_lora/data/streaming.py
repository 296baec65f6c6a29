"""Training rows that are read and tokenised while the model trains, for data larger than the disk.

Nothing is cached. A sampler hands the examples themselves to the loader, in place of their numbers: the loader, its
workers and exact resume then work as for rows in memory, and no worker reads or tokenises what another one does. Every
device reads the whole stream and takes its share of the examples. Which rows can be used is known only after they are
tokenised, and all devices must agree on the number of batches.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy
import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.bad_rows import refuse
from lightning_lora.data.batches.collate import Example
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.source_report import SourceReport
from lightning_lora.data.sources import FileSource, HubSource
from lightning_lora.data.split import check_context, check_ids, cut_notes
from lightning_lora.data.tokens import token_tables
from lightning_lora.errors import DataError

BUFFER = 10_000
"""Number of examples among which the next one is drawn."""


@dataclass
class TokenStream:
    """Tokens of sources that are read anew in each epoch.

    Args:
        sources: Files and hub datasets.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows to read in an epoch, from the first; None reads all.
        seed: Seeds the order, together with the epoch.
        on_bad_row: ``"error"`` stops at the first rows that cannot be used, ``"skip"`` leaves them out.
        num_proc: Processes that tokenise while the model trains; 1 tokenises between steps.
        vocab_size: Number of the model's embeddings; None if it is not known.
        context: Most tokens that the model was made for; None if it is not known, or not limited.
        whose: What says so, for the message.
    """

    sources: Sequence[FileSource | HubSource]
    tokenizer: PreTrainedTokenizerBase
    settings: RowSettings
    limit: int | None = None
    seed: int = 0
    on_bad_row: str = "error"
    num_proc: int = 1
    vocab_size: int | None = None
    context: int | None = None
    whose: str = ""
    told: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Read and tokenise the first rows, so that their faults are found before the model trains.

        Raises:
            DataError: If they cannot be used.
        """
        with closing(self._tables(num_proc=1)) as tables:
            table = next(tables)
        good = table.filter(table["problem"].is_null())
        notes = cut_notes(_as_dataset(good), self.settings.max_length) if len(good) else []
        met = set(table["renamed"].combine_chunks().flatten().to_pylist())
        notes += [f"no row has {name!r}, which columns maps" for name in self.settings.columns if name not in met]
        if notes:
            rank_zero_warn(f"train, its first {len(table):,} rows: {'; '.join(notes)}.", stacklevel=4)

    def examples(self, epoch: int) -> Generator[Example, None, None]:
        """The examples of an epoch, each drawn from the next `BUFFER` examples.

        Raises:
            DataError: If a row cannot be used and is not to be skipped, or if no row has a supervised token.
        """
        draw = random.Random(f"{self.seed} {epoch}")
        buffer: list[Example] = []
        with closing(self._tables(self.num_proc)) as tables:
            for example in (one for table in tables for one in _examples(table)):
                if len(buffer) < BUFFER:
                    buffer.append(example)
                    continue
                place = draw.randrange(BUFFER)
                chosen, buffer[place] = buffer[place], example
                yield chosen
        if not buffer:
            raise DataError("train: no row has a supervised token. Raise max_length.")
        draw.shuffle(buffer)
        yield from buffer

    def _tables(self, num_proc: int) -> Generator[pyarrow.Table, None, None]:
        left = self.limit
        for source in self.sources:
            if left == 0:
                return
            report = SourceReport(source.name)
            with closing(source.stream()) as rows:
                for table in token_tables(
                    islice(rows, left), source.name, self.tokenizer, self.settings, num_proc, source.is_document
                ):
                    report.add(table)
                    self._check(table, report)
                    yield table
            refuse([report.bad], self.on_bad_row)
            left = None if left is None else left - report.bad.rows
            if report.bad.count:
                rank_zero_info(f"{source.name}: {report.bad.count:,} of {report.bad.rows:,} rows left out")

    def _check(self, table: pyarrow.Table, report: SourceReport) -> None:
        if self.on_bad_row == "error":
            refuse([report.bad], "error")
        report.tell_new(self.told)
        if self.vocab_size is not None and table["largest_id"].to_numpy().max() >= self.vocab_size:
            check_ids(_as_dataset(table), self.vocab_size)
        check_context(_as_dataset(table), "train", self.settings.max_length, self.context, self.whose)


class StreamSampler(DistributedSampler[Any]):
    """Hands out this device's share of a stream: one example of every ``num_replicas``.

    If the number of examples is not a multiple of the number of devices, the last ones are repeated so that all devices
    have as many.

    Args:
        stream: The stream.
        num_replicas: Number of devices.
        rank: Index of this device.
    """

    def __init__(self, stream: TokenStream, num_replicas: int, rank: int) -> None:
        # Not the base's: it asks for the number of rows. Its class keeps Lightning from putting another in its place.
        self.stream = stream
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0

    @override
    def __iter__(self) -> Iterator[Example]:
        """Iterate over the examples of this device in the current epoch."""
        together: list[Example] = []
        for example in self.stream.examples(self.epoch):
            together.append(example)
            if len(together) == self.num_replicas:
                yield together[self.rank]
                together.clear()
        if together:
            yield together[self.rank % len(together)]

    @override
    def __len__(self) -> int:
        """Raise an error, as the number of rows is not known."""
        raise TypeError("the number of rows of a stream is not known")


class Drawn(TorchDataset[Example]):
    """The dataset of a loader whose sampler draws the examples themselves."""

    @override
    def __getitem__(self, index: Any) -> Example:
        """The example that was drawn."""
        return index


def _examples(table: pyarrow.Table) -> Iterator[Example]:
    ids, supervised = (table[name].combine_chunks() for name in ("input_ids", "supervised"))
    ends = ids.offsets.to_numpy()
    ids, supervised = ids.values.to_numpy(), supervised.values.to_numpy(zero_copy_only=False)
    weights = table["weight"].to_numpy()
    for row in numpy.flatnonzero((table["supervised_tokens"].to_numpy() > 0) & (weights > 0)):
        place = slice(ends[row], ends[row + 1])
        # Copies: a part of the table would keep all of it in memory for as long as the example is in the buffer.
        yield {"input_ids": ids[place].copy(), "supervised": supervised[place].copy(), "weight": weights[row]}


def _as_dataset(table: pyarrow.Table) -> Dataset:
    return Dataset(InMemoryTable(table))
