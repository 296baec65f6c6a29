"""What one optimizer step learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader


@dataclass(frozen=True)
class EffectiveBatch:
    """Rows of an optimizer step. Accumulation and devices *multiply* the micro-batch; neither divides it.

    Args:
        micro_batch: Rows of one forward and backward pass on one device.
        accumulation: Passes of each device before a step.
        num_ranks: Devices with data of their own.
    """

    micro_batch: int
    accumulation: int
    num_ranks: int

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.micro_batch * self.accumulation * self.num_ranks

    def __str__(self) -> str:
        devices = "device" if self.num_ranks == 1 else "devices"
        return (
            f"effective batch {self.rows} = {self.micro_batch} rows x {self.accumulation} accumulated "
            f"x {self.num_ranks} {devices}"
        )


def data_parallel_ranks(trainer: Trainer) -> int:
    """Processes that divide the data among themselves; those of tensor parallelism see the same rows."""
    share = trainer.distributed_sampler_kwargs
    return int(share["num_replicas"]) if share else 1


def present_batch(trainer: Trainer) -> EffectiveBatch:
    """That of a Trainer in training; a loader that does not say its rows is taken to have 1."""
    rows = rows_at_once(trainer.train_dataloader) or 1
    return EffectiveBatch(rows, trainer.accumulate_grad_batches, data_parallel_ranks(trainer))


def rows_at_once(loaders: Any) -> int | None:
    """Rows of a batch of one loader; None if it does not say, or if there are several."""
    found = loaders.flattened if isinstance(loaders, CombinedLoader) else [loaders]
    if len(found) != 1:
        return None
    rows = getattr(found[0], "batch_size", None) or getattr(
        getattr(found[0], "batch_sampler", None), "batch_size", None
    )
    return rows if isinstance(rows, int) else None
