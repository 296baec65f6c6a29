"""The rows of an optimizer step are given; micro-batch and accumulation follow, on whatever devices there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.batch.division import divide, divisors, refuse_two_masters
from lightning_lora.batch.trial_step import can_take_rows, step_fits
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_ranks, rows_at_once
from lightning_lora.errors import ConfigError
from lightning_lora.lightning_private import remake_training_loaders, training_loader_source, training_loaders
from lightning_lora.sharding.collectives import largest_of_ranks


class TargetBatchSize(Callback):
    """Holds the rows of an optimizer step: sets ``accumulate_grad_batches`` to what the devices at hand need for it.

    ``rows = micro-batch x accumulation x data-parallel processes``: a checkpoint of two devices goes on on one with
    steps of the same rows. It is set before optimizers and schedules are made, so they see the right number of steps.

    The micro-batch is the ``batch_size`` of the data module or module, or less if a device's share of the step is less.
    Where it does not fit into memory, the next smaller one is taken that divides the share: before training, a step of
    the longest rows is tried, and leaves nothing behind. Ranks agree on the smallest.

    Args:
        rows: Of an optimizer step, on all devices.
        fit_memory: Try whether the micro-batch fits. Only on one device and under DDP, with a ``batch_size`` that can
            be set; a step that communicates with other ranks by itself cannot be tried.

    Attributes:
        batch: The `EffectiveBatch` that was chosen; None before.

    Raises:
        ConfigError: Later: if devices and micro-batch do not divide the rows, or something else sets accumulation.
    """

    def __init__(self, rows: int = 32, fit_memory: bool = True) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ConfigError(f"target_batch_size must be a whole number of rows, 1 or more, got {rows!r}.")
        self.rows = rows
        self.fit_memory = fit_memory
        self.batch: EffectiveBatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose accumulation; optimizers and schedules are made after this."""
        if stage != "fit":
            return
        refuse_two_masters(trainer, pl_module, "target_batch_size")
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"target_batch_size={self.rows} chooses trainer.accumulate_grad_batches, which is "
                f"{trainer.accumulate_grad_batches} already: give one of the two."
            )
        at_once = _asked_rows(trainer, pl_module)
        self._set(trainer, pl_module, divide(self.rows, data_parallel_ranks(trainer), at_once), at_once)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the micro-batch until it fits; the optimizer is there, its state not yet loaded."""
        assert self.batch is not None
        if self.fit_memory:
            self._fit_memory(trainer, pl_module)
        rank_zero_info(str(self.batch))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loader does as it was told."""
        assert self.batch is not None
        found = rows_at_once(trainer.train_dataloader)
        if found not in (None, self.batch.micro_batch):
            raise ConfigError(
                f"batch_size is {self.batch.micro_batch}, but the training loader makes batches of {found} rows: let "
                f"train_dataloader() read self.batch_size."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was found."""
        if stage == "fit":
            trainer.accumulate_grad_batches = 1

    def _set(self, trainer: Trainer, module: LightningModule, batch: EffectiveBatch, at_once: int) -> None:
        self.batch = batch
        trainer.accumulate_grad_batches = batch.accumulation
        if batch.micro_batch == at_once:
            return
        if not _can_set_rows(trainer, module):
            raise ConfigError(
                f"batches of {at_once} rows are more than the {batch.micro_batch} that a device has in a step of "
                f"{batch.rows}: make the loader with batch_size={batch.micro_batch}."
            )
        lightning_setattr(module, "batch_size", batch.micro_batch)

    def _fit_memory(self, trainer: Trainer, module: LightningModule) -> None:
        assert self.batch is not None
        batch, reason = self.batch, None
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            reason = f"under {type(trainer.strategy).__name__} ranks would wait for one that runs out of memory"
        elif not _can_set_rows(trainer, module):
            reason = "the loader was not made by a module with a batch_size that can be set"
        with kept_random_state(trainer.strategy.root_device):
            loader = None if reason else training_loader_source(trainer).dataloader()
            if reason is None and not can_take_rows(loader):
                reason = f"rows cannot be chosen from a {type(loader).__name__} of this kind"
            if reason is not None:
                rank_zero_info(f"whether {batch.micro_batch} rows fit is not tried: {reason}; if not, set batch_size")
                return
            found = self._largest_that_fits(trainer, module, loader)
            if found != batch.micro_batch:
                with _loaders_made_again(trainer):
                    self._set(trainer, module, divide(batch.rows, batch.num_ranks, found), batch.micro_batch)

    def _largest_that_fits(self, trainer: Trainer, module: LightningModule, loader: Any) -> int:
        assert self.batch is not None
        share = self.batch.micro_batch * self.batch.accumulation
        for rows in divisors(share):
            if rows > self.batch.micro_batch:
                continue
            fails = not step_fits(trainer, module, loader, rows)
            if not largest_of_ranks(trainer, torch.tensor(int(fails))):
                return rows
            rank_zero_info(f"a step of the {rows} longest rows does not fit into memory")
        raise MemoryError("not even one row fits into memory in a training step.")


def _asked_rows(trainer: Trainer, module: LightningModule) -> int:
    """The ``batch_size`` of whoever makes the loader, or the loader's own."""
    source = training_loader_source(trainer)
    if source.is_module() and lightning_hasattr(module, "batch_size"):
        rows: Any = lightning_getattr(module, "batch_size")
    elif source.instance is module and is_overridden("setup", module):
        # Its loader may need what its setup makes, which comes later.
        rows = None
    else:
        with kept_random_state(trainer.strategy.root_device):
            rows = rows_at_once(source.dataloader())
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(
            f"target_batch_size needs the rows of a micro-batch: give {type(source.instance).__name__} an attribute "
            f"batch_size that its train_dataloader() reads."
        )
    return rows


def _can_set_rows(trainer: Trainer, module: LightningModule) -> bool:
    return training_loader_source(trainer).is_module() and lightning_hasattr(module, "batch_size")


@contextmanager
def _loaders_made_again(trainer: Trainer) -> Iterator[None]:
    """Loaders, and schedules for the steps they make, are those of what is set inside, if they were made already."""
    if not training_loaders(trainer):
        yield
        return
    planned = trainer.estimated_stepping_batches
    yield
    remake_training_loaders(trainer)
    # With drop_last, smaller batches may make one step more.
    if trainer.estimated_stepping_batches != planned:
        trainer.strategy.setup_optimizers(trainer)
