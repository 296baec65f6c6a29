"""Remarks to the user about the batch: its size, the order of its rows, rows that appear twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.reading import GOOD_STEPS, LARGEST_SWEPT, BatchReading, advice, count_of
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.lightning_private import training_loaders

_CHECKED_STEPS = 10
"""Measured steps whose rows are compared: each comparison copies rows from the device, at the end of the step."""


def announce_batch(batch: EffectiveBatch, reading: BatchReading, num_steps: float, first: Any) -> None:
    """Report the rows of a step and the number of steps, and warn if steps are few.

    Args:
        first: A micro-batch, which shows whether rows are packed.
    """
    rank_zero_info(f"{batch}, {count_of(num_steps, 'optimizer step')}")
    if reading.state == "step-starved":
        rank_zero_warn(advice(reading, batch, num_steps))
    elif num_steps < GOOD_STEPS:
        rank_zero_info(f"runs of at least {GOOD_STEPS} steps learn best: a smaller batch gives more steps")
    if batch.rows > LARGEST_SWEPT:
        rank_zero_info(f"published sweeps of fine-tuning end at {LARGEST_SWEPT} rows a step")
    if isinstance(first, Mapping) and "position_ids" in first and first.get("attention_mask") is None:
        rank_zero_info("rows are packed: the noise scale counts packed rows, not the examples in them")


def warn_of_stored_order(trainer: Trainer) -> None:
    """Warn if training rows come in the order in which they are stored."""
    if any(
        isinstance(sampler := loader.sampler, SequentialSampler)
        or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)
        for loader in training_loaders(trainer)
        # An iterable dataset has an order of its own, whatever its sampler says.
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    ):
        rank_zero_warn(
            "training rows come in the order they are stored in: where neighbours are alike, the batch-size monitor "
            "finds too much noise; set shuffle=True."
        )


class RepeatedRows:
    """Counts rows that appear twice in one optimizer step on this rank, in the first measured steps."""

    def __init__(self) -> None:
        self._num_repeated = self._num_rows = self._steps = 0
        self._batches: list[Any] = []

    def start(self) -> None:
        """Begin a step."""
        self._steps += 1
        self._batches = []

    def add(self, batch: Any) -> None:
        """Keep a micro-batch of the step."""
        if self._steps <= _CHECKED_STEPS:
            self._batches.append(batch)

    def finish(self) -> None:
        """Compare the rows of the step; where they are on a device, at a moment when that has nothing to do."""
        seen: set[bytes] = set()
        for key in (key for batch in self._batches for key in _row_keys(batch)):
            self._num_repeated += key in seen
            self._num_rows += 1
            seen.add(key)
        self._batches = []

    def warn(self) -> None:
        """Warn if at least a hundredth of the rows is repeated."""
        if self._num_repeated and self._num_repeated * 100 >= self._num_rows:
            rank_zero_warn(
                f"{self._num_repeated} of {self._num_rows} rows were in their optimizer step before: the batch-size "
                "monitor finds too little noise; remove duplicates from the data."
            )


def _row_keys(batch: Any) -> Iterator[bytes]:
    """The bytes of each row over all tensors of a batch, without padding, which depends on the other rows."""
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else (batch,)
    num_rows = count_rows(batch)
    tensors = [child.detach().cpu() for child in children if isinstance(child, Tensor) and child.dim()]
    tensors = [tensor for tensor in tensors if len(tensor) == num_rows]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = mask.detach().cpu().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for row in range(num_rows):
        parts = (
            tensor[row] if mask is None or tensor.shape != mask.shape else tensor[row][mask[row]] for tensor in tensors
        )
        yield b"".join(part.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
