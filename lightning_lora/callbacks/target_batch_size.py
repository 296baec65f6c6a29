"""Chooses micro-batch and accumulation for a given number of rows per optimizer step, on any number of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lora.batch.division import check_may_set_accumulation, divide_rows, divisors
from lightning_lora.batch.trial_step import can_choose_rows, longest_batches, step_fits
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.effective_batch import EffectiveBatch, data_parallel_size, loader_batch_size
from lightning_lora.errors import AccumulationError, check_arguments, check_count
from lightning_lora.lightning_private import remake_training_loaders, training_loader_source, training_loaders
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.run_step import TRACE_ERROR, RunStep, fills_device, gigabytes, room_of_run
from lightning_lora.sharding.collectives import largest_of_ranks
from lightning_lora.trainer_access import found


class TargetBatchSize(Callback):
    """Sets ``accumulate_grad_batches`` so that an optimizer step takes a given number of rows on the devices at hand.

    ``rows = micro-batch x accumulation x data-parallel processes``. A checkpoint from two devices continues on one with
    steps of the same rows. Accumulation is set before optimizers and schedules are made, so they see the right number
    of steps.

    The micro-batch is the ``batch_size`` of the data module or module, or a device's share of the step if that is less.
    Before training, a step of the longest rows is tried, and all is restored. If it does not fit into memory, the next
    smaller micro-batch that divides the share is tried. All ranks take the smallest. On a GPU, and on a CPU whose
    memory is limited for the process or half filled by the model, a step is traced before (`lightning_lora.memory`),
    and micro-batches that are clearly too large for the device's memory are not tried.

    Args:
        rows: Rows of an optimizer step on all devices.
        fit_memory: Whether to try if the micro-batch fits. This needs one device or DDP, a ``batch_size`` that can be
            set, and a ``training_step`` that does not communicate with other ranks itself.

    Attributes:
        batch: The `EffectiveBatch` that was chosen; None before.

    Raises:
        ConfigError: If ``rows`` is not a positive integer; at the start of a fit, if devices and micro-batch do not
            divide the rows, or something else sets accumulation.
    """

    def __init__(self, rows: int = 32, fit_memory: bool = True) -> None:
        check_arguments(TargetBatchSize, locals(), AccumulationError)
        check_count("target_batch_size", rows, AccumulationError)
        self.rows = rows
        self.fit_memory = fit_memory
        self.batch: EffectiveBatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose accumulation, before optimizers and schedules are made."""
        if stage != "fit":
            return
        check_may_set_accumulation(trainer, pl_module, "target_batch_size")
        if found(trainer, BatchSizeFinder) is not None:
            raise AccumulationError(
                "BatchSizeFinder and target_batch_size both choose batch_size: keep one of the two. target_batch_size "
                "lowers it until a step fits into memory."
            )
        if trainer.accumulate_grad_batches != 1:
            raise AccumulationError(
                f"target_batch_size={self.rows} chooses trainer.accumulate_grad_batches, which is "
                f"{trainer.accumulate_grad_batches} already: give one of the two."
            )
        asked = _asked_micro_batch(trainer, pl_module)
        self._set(trainer, pl_module, divide_rows(self.rows, data_parallel_size(trainer), asked), asked)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the micro-batch until it fits. The optimizer exists by now, and its state is not yet loaded."""
        assert self.batch is not None
        if self.fit_memory:
            self._fit_memory(trainer, pl_module)
        rank_zero_info(str(self.batch))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loader makes batches of the chosen rows."""
        assert self.batch is not None
        found = loader_batch_size(trainer.train_dataloader)
        if found not in (None, self.batch.micro_batch):
            raise AccumulationError(
                f"batch_size is {self.batch.micro_batch}, but the training loader makes batches of {found} rows: let "
                f"train_dataloader() read self.batch_size."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the accumulation of the Trainer."""
        if stage == "fit":
            trainer.accumulate_grad_batches = 1

    def _set(self, trainer: Trainer, module: LightningModule, batch: EffectiveBatch, asked: int) -> None:
        """Set accumulation, and ``batch_size`` unless the micro-batch is the one that was asked for."""
        self.batch = batch
        trainer.accumulate_grad_batches = batch.accumulation
        if batch.micro_batch == asked:
            return
        if not _can_set_batch_size(trainer, module):
            raise AccumulationError(
                f"batches of {asked} rows are more than the {batch.micro_batch} that a device has in a step of "
                f"{batch.rows}: make the loader with batch_size={batch.micro_batch}."
            )
        lightning_setattr(module, "batch_size", batch.micro_batch)

    def _fit_memory(self, trainer: Trainer, module: LightningModule) -> None:
        assert self.batch is not None
        batch, reason = self.batch, None
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            reason = f"under {type(trainer.strategy).__name__} ranks would wait for one that runs out of memory"
        elif not _can_set_batch_size(trainer, module):
            reason = "the loader was not made by a module with a batch_size that can be set"
        with kept_random_state(trainer.strategy.root_device):
            loader = None if reason else training_loader_source(trainer).dataloader()
            if reason is None and not can_choose_rows(loader):
                reason = f"rows cannot be chosen from a {type(loader).__name__} of this kind"
            if reason is not None:
                rank_zero_info(f"{batch.micro_batch} rows are not tried: {reason}; if they do not fit, set batch_size")
                return
            found = self._largest_that_fits(trainer, module, loader)
            if found != batch.micro_batch:
                with _loaders_made_again(trainer):
                    self._set(trainer, module, divide_rows(batch.rows, batch.num_ranks, found), batch.micro_batch)

    def _largest_that_fits(self, trainer: Trainer, module: LightningModule, loader: Any) -> int:
        assert self.batch is not None
        share = self.batch.micro_batch * self.batch.accumulation
        sizes = [rows for rows in divisors(share) if rows <= self.batch.micro_batch]
        first, told = _first_to_try(trainer, module, loader, share, sizes)
        first = -int(largest_of_ranks(trainer, torch.tensor(-first)))
        for rows in sizes[sizes.index(first) :]:
            fails = not step_fits(trainer, module, loader, rows)
            if not largest_of_ranks(trainer, torch.tensor(int(fails))):
                return rows
            rank_zero_info(f"a step of the {rows} longest rows does not fit into memory")
        raise MemoryError(f"a training step does not fit into memory, not even with one row{told}.")


def _first_to_try(
    trainer: Trainer, module: LightningModule, loader: Any, share: int, sizes: Sequence[int]
) -> tuple[int, str]:
    """The largest of ``sizes`` that by its trace is not clearly too large for the device; what was traced, in words."""
    room = room_of_run(trainer, module)
    if room is None or len(sizes) == 1 or not (room.is_limit or fills_device(module, room)):
        return sizes[0], ""
    step = RunStep(trainer, lambda: module, longest_batches(trainer, loader, sizes[0]))
    try:
        found = step.largest_micro_batch(room.bytes, share, sizes, error=TRACE_ERROR)
        rows = found or sizes[-1]
        needed = step.memory(rows, share // rows).total
    except TraceError as error:
        rank_zero_info(f"micro-batches are tried from {sizes[0]} rows down: {error}")
        return sizes[0], ""
    told = f"a traced step with batches of {rows} takes {gigabytes(needed)}, and the device has {gigabytes(room.bytes)}"
    if not found:
        rank_zero_warn(f"not even one row seems to fit into memory: {told} for it. It is tried all the same.")
    elif rows != sizes[0]:
        rank_zero_info(f"a batch_size above {rows} is not tried: {told} for it")
    return rows, f": {told}"


def _asked_micro_batch(trainer: Trainer, module: LightningModule) -> int:
    """The ``batch_size`` of the module or data module that makes the loader, or of the loader itself."""
    source = training_loader_source(trainer)
    if source.is_module() and lightning_hasattr(module, "batch_size"):
        rows: Any = lightning_getattr(module, "batch_size")
    elif source.instance is module and is_overridden("setup", module):
        # Its loader may need what its setup makes, and setup has not run yet.
        rows = None
    else:
        with kept_random_state(trainer.strategy.root_device):
            rows = loader_batch_size(source.dataloader())
    if not isinstance(rows, int) or rows < 1:
        raise AccumulationError(
            f"target_batch_size needs the rows of a micro-batch: give {type(source.instance).__name__} an attribute "
            f"batch_size that its train_dataloader() reads."
        )
    return rows


def _can_set_batch_size(trainer: Trainer, module: LightningModule) -> bool:
    return training_loader_source(trainer).is_module() and lightning_hasattr(module, "batch_size")


@contextmanager
def _loaders_made_again(trainer: Trainer) -> Iterator[None]:
    """Make loaders again, and schedules for their number of steps, if they were made before what is set inside."""
    if not training_loaders(trainer):
        yield
        return
    planned = trainer.estimated_stepping_batches
    yield
    remake_training_loaders(trainer)
    # With drop_last, smaller batches may make one more step.
    if trainer.estimated_stepping_batches != planned:
        trainer.strategy.setup_optimizers(trainer)
