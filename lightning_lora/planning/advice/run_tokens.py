"""The tokens of a whole run, counted from the order in which its rows will be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule

from lightning_lora.batch.counting import count_supervised
from lightning_lora.data import SFTDataModule
from lightning_lora.data.split import column, row_lengths
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.planning.data_counts import DataCounts


def run_tokens(
    data: LightningDataModule,
    counts: DataCounts,
    epoch: Epoch,
    length: RunLength,
    batch: PlannedBatch,
    example: Any = None,
) -> dict[str, int]:
    """The tokens of all steps on all devices, exactly, as `PlannedRun` counts them.

    A data module of ours draws its rows by its own seed, so the run is replayed by row numbers: a last batch that is
    left out, rows that a sampler repeats to give each device equally many, and the last step of ``max_steps`` count as
    they train. Of other data, whole epochs and labels are known.

    Args:
        example: A batch of the data, which tells what a run without tokens counts.

    Returns:
        ``tokens``, those that are trained on (rows, where data has no tokens), and ``total_tokens``, all without
        padding; nothing where the order of the rows cannot be known before the run.
    """
    if isinstance(data, SFTDataModule) and "train" in data.rows:
        return _replayed(data, epoch, length, batch)
    if counts.unit == "unknown" and counts.rows and epoch.rows is not None and _counts_rows(example):
        return {"tokens": _rows(epoch, length, batch)}
    if None in (counts.supervised_tokens, counts.rows, epoch.rows) or counts.counted_rows not in (None, counts.rows):
        return {}
    assert counts.supervised_tokens is not None
    assert counts.rows is not None
    rows = _rows(epoch, length, batch)
    if counts.unit == "labels":
        # With several labels in a row, a run without tokens counts rows, which these are not.
        return {"tokens": rows} if counts.supervised_tokens == counts.rows == epoch.rows else {}
    epochs, rest = divmod(rows, counts.rows)
    if rest or not epochs or counts.rows % batch.devices or epoch.rows != counts.rows:
        return {}
    found = {"tokens": counts.supervised_tokens * epochs}
    return found if counts.mean_row is None else found | {"total_tokens": round(counts.mean_row * counts.rows) * epochs}


def _counts_rows(example: Any) -> bool:
    """Whether `PlannedRun` counts the rows of such a batch: one without tokens, and without labels by name."""
    has_labels = isinstance(example, Mapping) and "labels" in example
    return example is not None and not has_labels and count_supervised(example) is None


def _rows(epoch: Epoch, length: RunLength, batch: PlannedBatch) -> int:
    """The rows of a run, repeated ones too."""
    share = -(-(epoch.rows or 0) // batch.devices)
    return sum(min(part * batch.batch_size, share) * batch.devices for part in _parts(epoch, length, batch))


def _replayed(data: SFTDataModule, epoch: Epoch, length: RunLength, batch: PlannedBatch) -> dict[str, int]:
    rows = data.rows["train"]
    sizes = numpy.stack([column(rows, "supervised_tokens"), row_lengths(rows, data.max_length)]).astype(numpy.int64)
    found = numpy.zeros(2, dtype=numpy.int64)
    samplers = [data._sampler(batch.devices, rank) for rank in range(batch.devices)]
    for number, batches in enumerate(_parts(epoch, length, batch)):
        for sampler in samplers:
            sampler.set_epoch(number)
            drawn = list(sampler)[: batches * batch.batch_size]
            # A packing sampler draws the rows that share one.
            used = [row for pack in drawn for row in pack] if data.packing == "length" else drawn
            found += sizes[:, used].sum(axis=1)
    return {"tokens": int(found[0]), "total_tokens": int(found[1])}


def _parts(epoch: Epoch, length: RunLength, batch: PlannedBatch) -> list[int]:
    return length.parts(epoch, batch.batch_size, batch.accumulate_grad_batches, batch.devices)
