"""The effective batch: how many rows one optimizer step learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

if TYPE_CHECKING:
    from lightning.pytorch import Trainer  # a report of a run, which asks for the word of a batch, starts without it


@dataclass(frozen=True)
class EffectiveBatch:
    """Rows of an optimizer step: accumulation and devices *multiply* the micro-batch.

    Args:
        micro_batch: Rows of one forward and backward pass on one device.
        accumulation: Forward and backward passes of each device per optimizer step.
        num_ranks: Devices that see different rows.
    """

    micro_batch: int
    accumulation: int
    num_ranks: int

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """The effective batch of a running Trainer. A loader without a batch size counts as one row per batch."""
        rows = loader_batch_size(trainer.train_dataloader) or 1
        return cls(rows, trainer.accumulate_grad_batches, data_parallel_size(trainer))

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.micro_batch * self.accumulation * self.num_ranks

    def __str__(self) -> str:
        rows = "row" if self.micro_batch == 1 else "rows"
        devices = "device" if self.num_ranks == 1 else "devices"
        return (
            f"effective batch {self.rows} = {self.micro_batch} {rows} x {self.accumulation} accumulated "
            f"x {self.num_ranks} {devices}"
        )


def data_parallel_size(trainer: Trainer) -> int:
    """The number of processes that see different rows. Ranks of tensor parallelism see the same rows."""
    sampler = trainer.distributed_sampler_kwargs
    return int(sampler["num_replicas"]) if sampler else 1


def loader_batch_size(loaders: Any) -> int | None:
    """Rows per batch of a single loader; None if it does not tell, or if there are several loaders."""
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    found = loaders.flattened if isinstance(loaders, CombinedLoader) else [loaders]
    if len(found) != 1:
        return None
    rows = getattr(found[0], "batch_size", None) or getattr(
        getattr(found[0], "batch_sampler", None), "batch_size", None
    )
    return rows if isinstance(rows, int) else None
