"""Counts the labels of data that are not ours: classes, entropy, repeated rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_lora.data.batches.collate import IGNORE_INDEX
from lightning_lora.errors import DataError
from lightning_lora.planning.data_counts import DataCounts, without_counts
from lightning_lora.planning.dataset_targets import RowTargets, UnknownTargetsError, plain_collate, read_targets
from lightning_lora.planning.set_up_data import copy_with_generators


def count_labels(loaders: Any) -> DataCounts:
    """Count rows and labels of one epoch of a training loader; of several loaders, of all of them together.

    Labels are integers: the last part of an item that is a tuple, or the ``labels``, ``label``, ``y``, ``target`` or
    ``targets`` of one that is a mapping, or what a dataset lists in ``targets`` or ``labels``. A row may have one label
    or many (a label for each pixel); -100 is none. If labels are the ``input_ids`` of their own row, they are tokens.
    Loaders and their samplers are not used up, and the random state stays as it is.

    Raises:
        DataError: If there is no row, or no row has a label.
    """
    with isolate_rng():
        counts = [_count(loader) for loader in _flattened(loaders)]
    if not counts:
        raise DataError("train: there is no training loader, so there are no rows.")
    return counts[0] if len(counts) == 1 else _together(counts)


def _flattened(loaders: Any) -> list[Any]:
    """All loaders of what a data module may return: one, or a list or mapping of them."""
    if isinstance(loaders, CombinedLoader):
        return loaders.flattened
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for part in loaders for loader in _flattened(part)]
    return [] if loaders is None else [loaders]


def _count(loader: Any) -> DataCounts:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return without_counts("unknown", None)
    rows = epoch_rows(loader)
    if not len(rows):
        raise DataError("train: the training loader has no rows.")
    tally = _Tally()
    try:
        for targets in read_targets(dataset, rows, None if plain_collate(loader.collate_fn) else loader.collate_fn):
            tally.add(targets)
    except UnknownTargetsError:
        return without_counts("unknown", len(rows))
    if not tally.labels:
        raise DataError(
            f"train: no row has a target: all labels of the {tally.rows:,} rows are {IGNORE_INDEX}, which is no label."
        )
    return tally.counts(len(rows))


def epoch_rows(loader: Any) -> numpy.ndarray:
    """The numbers of the rows of an epoch, as a copy of the loader's sampler draws them."""
    batches: Any = loader.batch_sampler
    own = type(batches) in (BatchSampler, type(None))
    # Beside a batch sampler, the loader has a sampler of its own, which it does not use.
    sampler: Any = batches.sampler if isinstance(batches, BatchSampler) else loader.sampler
    drawn = sampler if own else batches
    is_whole = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    # An iterator gives its rows only once: it is left alone.
    if isinstance(drawn, Iterator) or (own and is_whole and len(sampler) == len(loader.dataset)):
        return numpy.arange(len(loader.dataset))
    drawn = copy_with_generators(drawn)
    return numpy.array(list(drawn) if own else [row for batch in drawn for row in batch], dtype=numpy.int64)


class _Tally:
    """What was found in the rows so far."""

    def __init__(self) -> None:
        self.rows = self.labels = self.unsupervised = self.duplicates = 0
        self.seen: set[int] = set()
        self.classes: Counter[int] = Counter()
        self.lengths: list[int] = []
        self.knows_duplicates = True

    def add(self, targets: RowTargets) -> None:
        """Add some rows."""
        has_label = targets.values.reshape(len(targets.values), -1) != IGNORE_INDEX
        self.rows += len(has_label)
        self.labels += int(has_label.sum())
        self.unsupervised += int((~has_label.any(1)).sum())
        if targets.lengths is not None:
            self.lengths += targets.lengths.tolist()
        is_new = numpy.ones(len(has_label), dtype=bool)
        if targets.digests is None:
            self.knows_duplicates = False
        else:
            for row, digest in enumerate(targets.digests.tolist()):
                is_new[row] = digest not in self.seen
                self.seen.add(digest)
        self.duplicates += int((~is_new).sum())
        new = targets.values.reshape(has_label.shape)[is_new]
        classes, counts = numpy.unique(new[has_label[is_new]], return_counts=True)
        self.classes.update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))

    def counts(self, rows: int) -> DataCounts:
        """The counts of ``rows`` rows, of which those that were added are all or a sample."""
        are_tokens, is_sample = len(self.lengths) == self.rows, self.rows < rows
        unique = sum(self.classes.values())
        shares = numpy.array(list(self.classes.values())) / unique
        entropy = 1.0 if are_tokens else max(0.0, float(-(shares * numpy.log2(shares)).sum()))
        scale = rows / self.rows
        return DataCounts(
            unit="tokens" if are_tokens else "labels",
            rows=rows,
            supervised_tokens=round(self.labels * scale),
            unique_supervised_tokens=round(unique * scale),
            bits=unique * scale * entropy,
            # A repeated row is hardly ever twice in a small sample.
            duplicate_rows=self.duplicates if self.knows_duplicates and not is_sample else None,
            truncated_rows=0,
            unsupervised_rows=round(self.unsupervised * scale),
            longest_row=max(self.lengths) if are_tokens else None,
            mean_row=float(numpy.mean(self.lengths)) if are_tokens else None,
            counted_rows=self.rows if is_sample else None,
            num_classes=None if are_tokens else len(self.classes),
        )


def _together(counts: list[DataCounts]) -> DataCounts:
    """The sum over several loaders; unknown if anything of one of them is."""
    units = {each.unit for each in counts}
    rows = _sum(each.rows for each in counts)
    if units not in ({"tokens"}, {"labels"}) or rows is None:
        return without_counts("unknown", rows)
    are_samples = any(each.counted_rows for each in counts)
    return replace(
        counts[0],
        rows=rows,
        supervised_tokens=_sum(each.supervised_tokens for each in counts),
        unique_supervised_tokens=_sum(each.unique_supervised_tokens for each in counts),
        bits=sum(each.bits or 0.0 for each in counts),
        duplicate_rows=_sum(each.duplicate_rows for each in counts),
        unsupervised_rows=sum(each.unsupervised_rows for each in counts),
        longest_row=max(each.longest_row or 0 for each in counts) or None,
        mean_row=sum((each.mean_row or 0.0) * (each.rows or 0) for each in counts) / rows or None,
        counted_rows=_sum(each.counted_rows or each.rows for each in counts) if are_samples else None,
        num_classes=max(each.num_classes or 0 for each in counts) or None,
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    """The sum; None if any of the numbers is."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)
