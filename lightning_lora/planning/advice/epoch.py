"""The optimizer steps of a run, counted as Lightning counts them, before there is a Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_lora.effective_batch import loader_batch_size
from lightning_lora.errors import PlanError


@dataclass(frozen=True)
class Epoch:
    """What a training loader draws in one epoch on one device.

    Args:
        rows: Rows (or packs of rows) of an epoch; None for a stream, which does not tell.
        drop_last: Whether a last batch with fewer rows is left out.
    """

    rows: int | None
    batch_size: int
    drop_last: bool = False

    @classmethod
    def of(cls, loader: Any) -> Epoch:
        """The epoch of a loader; one that tells only its number of batches has one row in each."""
        rows = loader_batch_size(loader)
        if isinstance(loader, DataLoader) and rows is not None and isinstance(loader.batch_sampler, BatchSampler):
            return cls(_length(loader.sampler), rows, loader.drop_last or loader.batch_sampler.drop_last)
        return cls(_length(loader), 1)

    def batches(self, micro_batch: int, devices: int, limit: float | int | None = None) -> int | None:
        """Batches of each device in an epoch; a distributed sampler repeats rows until devices have equally many."""
        if self.rows is None:
            return limit if isinstance(limit, int) else None
        share = math.ceil(self.rows / devices)
        batches = share // micro_batch if self.drop_last else math.ceil(share / micro_batch)
        if isinstance(limit, float):
            return int(batches * limit)
        return batches if limit is None else min(batches, limit)


@dataclass(frozen=True)
class RunLength:
    """How long a run goes on, from the settings of a Trainer.

    Args:
        epochs: Most epochs; -1 for no limit.
        max_steps: Most optimizer steps; -1 for no limit.
        limit_train_batches: Batches of an epoch that are used: a number, a share, or None for all.
        val_check_interval: Batches between two validations: a number, a share of an epoch, or a time in words.
        check_val_every_n_epoch: Epochs between two that validate; None counts batches across epochs.
    """

    epochs: int = 1
    max_steps: int = -1
    limit_train_batches: float | int | None = None
    val_check_interval: Any = 1.0
    check_val_every_n_epoch: int | None = 1

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> RunLength:
        """The length that settings of a Trainer give; without any, one epoch."""
        epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
        steps = -1 if steps is None else int(steps)
        if epochs is None:
            epochs = 1 if steps == -1 else -1
        interval = trainer.get("val_check_interval")
        return cls(
            int(epochs),
            steps,
            trainer.get("overfit_batches") or trainer.get("limit_train_batches"),
            1.0 if interval is None else interval,
            trainer.get("check_val_every_n_epoch", 1),
        )

    def steps(self, epoch: Epoch, micro_batch: int, accumulation: int, devices: int) -> int:
        """Optimizer steps of the run; the last step of an epoch may have fewer micro-batches.

        Raises:
            ConfigError: If nothing tells when the run ends.
        """
        batches = epoch.batches(micro_batch, devices, self.limit_train_batches)
        if batches is None or self.epochs == -1:
            if self.max_steps == -1:
                raise PlanError(
                    "nothing tells how long the run is: the rows are a stream, or max_epochs is -1. Set "
                    "trainer.max_steps."
                )
            return self.max_steps
        steps = math.ceil(batches / accumulation) * self.epochs
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    def parts(self, epoch: Epoch, micro_batch: int, accumulation: int, devices: int) -> list[int]:
        """Micro-batches of each device in each epoch of the run; of a stream, all in one."""
        steps = self.steps(epoch, micro_batch, accumulation, devices)
        in_epoch = epoch.batches(micro_batch, devices, self.limit_train_batches)
        if in_epoch is None:
            return [steps * accumulation]
        found = []
        while in_epoch and steps > 0:
            found.append(min(in_epoch, steps * accumulation))
            steps -= math.ceil(in_epoch / accumulation)
        return found

    def validations(self, epoch: Epoch, micro_batch: int, accumulation: int, devices: int) -> int | None:
        """Passes over the validation rows, without the sanity check before training; None if a clock decides."""
        parts = self.parts(epoch, micro_batch, accumulation, devices)
        interval = self.val_check_interval
        if isinstance(interval, float):
            in_epoch = epoch.batches(micro_batch, devices, self.limit_train_batches)
            interval = None if in_epoch is None else max(1, int(in_epoch * interval))
        if not isinstance(interval, int):
            return None
        if self.check_val_every_n_epoch is None:
            return sum(parts) // interval
        every = self.check_val_every_n_epoch
        return sum(part // interval for number, part in enumerate(parts, 1) if number % every == 0)

    def __str__(self) -> str:
        if self.max_steps != -1:
            return f"at most {self.max_steps:,} steps"
        return f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # a stream
        return None
