"""Remarks to the user about the batch: its size, the order of its rows, rows it holds twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.state import GOOD_STEPS, LARGEST_SWEPT, BatchReading, advice
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.lightning_private import training_loaders


def is_in_order(trainer: Trainer) -> bool:
    """Whether training rows come in the order in which they are stored."""
    return any(
        isinstance(sampler := loader.sampler, SequentialSampler)
        or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)
        for loader in training_loaders(trainer)
        # An iterable dataset has an order of its own, whatever its sampler says.
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    )


def is_packed(batch: Any) -> bool:
    """Whether the rows of a batch hold several examples each."""
    return isinstance(batch, Mapping) and "position_ids" in batch and batch.get("attention_mask") is None


class RepeatedRows:
    """Looks, in the first measured steps, for rows that an optimizer step has twice on this rank.

    Args:
        num_steps: How many are looked at: each look copies rows off the device.
    """

    def __init__(self, num_steps: int = 10) -> None:
        self.num_steps = num_steps
        self._num_repeated = self._num_rows = self._steps = 0
        self._seen: set[bytes] = set()

    def start(self) -> None:
        """Begin a step."""
        self._steps += 1
        self._seen = set()

    def add(self, batch: Any) -> None:
        """Look at a micro-batch."""
        if self._steps > self.num_steps:
            return
        for key in _keys(batch):
            self._num_repeated += key in self._seen
            self._num_rows += 1
            self._seen.add(key)

    def finding(self) -> str | None:
        """What to tell the user; None if less than a hundredth of the rows is repeated."""
        if self._num_repeated * 100 < max(self._num_rows, 1):
            return None
        return (
            f"{self._num_repeated} of {self._num_rows} rows were in their optimizer step before: the batch-size "
            "monitor finds too little noise; remove duplicates from the data."
        )


def _keys(batch: Any) -> Iterator[bytes]:
    """For each row the bytes of all that a batch holds of it; padding is left out, it depends on the other rows."""
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


def announce_batch(batch: EffectiveBatch, reading: BatchReading, num_steps: float, is_packed: bool) -> None:
    """Say what a step takes and how many steps there are; warn if they are few.

    Args:
        batch: Of a step.
        reading: Of this batch; it knows no noise yet.
        num_steps: Optimizer steps of the whole run.
        is_packed: Whether rows hold several examples.
    """
    rank_zero_info(f"{batch}, {num_steps:.0f} optimizer steps")
    if reading.state == "step-starved":
        rank_zero_warn(advice(reading, batch, num_steps))
    elif num_steps < GOOD_STEPS:
        rank_zero_info(f"runs of {GOOD_STEPS} steps and more learn best: a smaller batch makes more of them")
    if batch.rows > LARGEST_SWEPT:
        rank_zero_info(f"published sweeps of fine-tuning end at {LARGEST_SWEPT} rows a step")
    if is_packed:
        rank_zero_info("rows are packed: the noise scale counts packed rows, not the examples in them")
