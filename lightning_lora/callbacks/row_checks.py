"""What in the data makes a noise scale wrong: rows in an order, rows twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from .pace import count_rows


def is_in_order(trainer: Trainer) -> bool:
    """Whether training rows come in the order in which they are stored."""
    return any(
        isinstance(sampler := loader.sampler, SequentialSampler)
        or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)
        for loader in trainer.fit_loop._combined_loader.flattened  # pyright: ignore[reportOptionalMemberAccess]
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
