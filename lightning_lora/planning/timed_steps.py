"""A few real optimizer steps, timed on this machine, and what they say of a whole run."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.trial_step import is_out_of_memory
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.planning.cost import TIMED, RunSeconds

WARM_UP = 2
"""Steps that are not counted: the first ones make buffers, choose kernels and start workers."""
OTHER_MINUTES = 0.1
"""Relative uncertainty of carrying a time of now over to later: the least half-width of an interval."""
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for a two-sided interval of 95 % by degrees of freedom, from 1."""
_SIZES, _SECONDS_FOR_SIZES = 200, 2.0
"""Most further batches, and most seconds, for the mean size of a batch."""


@dataclass(frozen=True)
class StepTimes:
    """Timed optimizer steps.

    Args:
        seconds: Seconds of each step.
        sizes: Size of each step: positions with padding, or rows where there are no tokens.
        usual_size: Mean size of a step of the run, over more batches than were timed.
        validation: Seconds of each validation batch that was timed.
    """

    seconds: Sequence[float]
    sizes: Sequence[float]
    usual_size: float
    validation: Sequence[float] = ()

    def for_run(self, steps: int, validation_batches: int = 0) -> RunSeconds:
        """The time of a run of the same steps.

        Args:
            steps: Optimizer steps of the run.
            validation_batches: Validation batches of the whole run.
        """
        rate = sum(self.seconds) / sum(self.sizes)
        per_step = rate * self.usual_size
        residuals = [taken - rate * size for taken, size in zip(self.seconds, self.sizes, strict=True)]
        count = len(residuals)
        if count > 1:
            error = math.sqrt(sum(residual**2 for residual in residuals) / (count - 1) / count)
            relative = math.hypot(
                _T[min(count - 1, len(_T)) - 1] * error / statistics.fmean(self.seconds), OTHER_MINUTES
            )
        else:
            relative = 0.5
        validation = statistics.fmean(self.validation) * validation_batches if self.validation else 0.0
        total = per_step * steps + validation
        how = f"{count} optimizer steps timed here, scaled by the size of their batches; +- {relative:.0%}"
        if validation_batches:
            how += ", with validation" if self.validation else ", without validation"
        return RunSeconds(total, total * max(0.0, 1 - relative), total * (1 + relative), per_step, TIMED, how)


def time_steps(
    module: LightningModule,
    datamodule: LightningDataModule,
    trainer: Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    steps: int = 8,
    max_seconds: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes | None:
    """Train a copy of ``module`` for a few steps, and time them; None if it does not fit into memory.

    The module, the data module, random generators and files stay as they are.

    Args:
        module: The module of the run; if it is not built, its copy is built as ``fit`` builds it.
        datamodule: The data module of the run.
        trainer: Settings of the run's Trainer that change a step: ``precision``, ``accumulate_grad_batches``,
            ``gradient_clip_val``, ``accelerator``. Others are left out.
        callbacks: Callbacks that change the module, such as `LoRA`.
        steps: Steps to time, after two that are not counted.
        max_seconds: No step is begun after so many seconds; two steps are always timed.
        clock: Gives seconds.
    """
    watch = _Stopwatch(steps, max_seconds, clock)
    given = trainer or {}
    options = {name: given[name] for name in _STEP_OPTIONS if given.get(name) is not None}
    with _unseen(), tempfile.TemporaryDirectory() as folder:
        runner = Trainer(**(_QUIET | options), default_root_dir=folder, callbacks=[*copy.deepcopy(callbacks), watch])
        try:
            runner.fit(_copied(module), datamodule=_shallow(datamodule))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        usual = _usual_size(runner) or statistics.fmean(watch.sizes)
    if not watch.seconds:
        return None
    return StepTimes(watch.seconds, watch.sizes, usual, watch.validation[1:])


_STEP_OPTIONS = (
    "accelerator",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "use_distributed_sampler",
)
_QUIET: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 4,
    "limit_val_batches": 4,
}


@dataclass
class _Stopwatch(Callback):
    """Times whole optimizer steps, with reading their batches, and the batches of the sanity check of validation."""

    steps: int
    max_seconds: float
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = self._mark = self._left_out = self._val_mark = 0.0
        self._size = self._last_step = self._done = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = self._mark = self._now(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the size of the batch."""
        self._size += batch_size(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a step that has ended, and stop after enough."""
        if trainer.global_step == self._last_step:
            return
        self._last_step, now = trainer.global_step, self._now(pl_module)
        self._done += 1
        if self._done > WARM_UP:
            self.seconds.append(now - self._mark - self._left_out)
            self.sizes.append(self._size)
        self._mark, self._left_out, self._size = now, 0.0, 0
        is_late = now - self._begun > self.max_seconds and len(self.seconds) >= 2
        trainer.should_stop = len(self.seconds) >= self.steps or is_late

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when validation begins."""
        self._val_begun = self._now(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of a step's time."""
        self._left_out += self._now(pl_module) - self._val_begun

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note when a validation batch begins."""
        self._val_mark = self._now(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record a validation batch of the sanity check."""
        if trainer.sanity_checking:
            self.validation.append(self._now(pl_module) - self._val_mark)

    def _now(self, module: LightningModule) -> float:
        if module.device.type != "cpu":
            torch.accelerator.synchronize()
        return self.clock()


def batch_size(batch: Any) -> int:
    """Positions of a batch with padding, or its rows without tokens."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return tokens.numel() if isinstance(tokens, Tensor) else count_rows(batch)


def _usual_size(trainer: Trainer) -> float | None:
    """The mean size of an optimizer step over batches of an epoch; None if no batch comes."""
    sizes: list[int] = []
    begun = time.perf_counter()
    for batch in trainer.train_dataloader:  # pyright: ignore[reportOptionalIterable]
        sizes.append(batch_size(batch))
        if len(sizes) >= _SIZES or time.perf_counter() - begun > _SECONDS_FOR_SIZES:
            break
    return statistics.fmean(sizes) * trainer.accumulate_grad_batches if sizes else None


def _copied(module: LightningModule) -> LightningModule:
    trainer = attached_trainer(module)
    module.trainer = None
    try:
        return copy.deepcopy(module)
    finally:
        module.trainer = trainer


def _shallow(datamodule: LightningDataModule) -> LightningDataModule:
    """A copy that holds the same rows; what ``setup`` assigns stays in it."""
    twin = copy.copy(datamodule)
    for name, value in vars(datamodule).items():
        if type(value) in (dict, list, set):
            setattr(twin, name, copy.copy(value))
        elif isinstance(value, torch.Generator):
            setattr(twin, name, value.clone_state())
    return twin


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep the random state, and say nothing of a run that does not count."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
