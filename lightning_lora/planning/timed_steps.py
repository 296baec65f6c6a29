"""A few real batches, timed on this machine, and what they say of a whole run."""

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
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lora.batch.trial_step import is_out_of_memory
from lightning_lora.lightning_messages import messages_from
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.planning.cost import TIMED, RunSeconds, RunWork
from lightning_lora.planning.set_up_data import copy_with_generators
from lightning_lora.planning.stop_signals import ending_at_once
from lightning_lora.planning.timing.shapes import Shape, with_rows
from lightning_lora.planning.timing.stopwatch import Stopwatch
from lightning_lora.student_t import t_quantile

OTHER_MINUTES = 0.1
"""Relative uncertainty of carrying a time of now over to later: the least half-width of an interval."""
OTHER_ROWS = 0.1
"""The same for a time of fewer rows than those of a micro-batch."""


@dataclass(frozen=True)
class StepTimes:
    """Timed parts of training.

    Args:
        micro: Seconds of each micro-batch: reading, forward and backward.
        validation: Seconds and shape of each timed validation batch.
    """

    micro: Sequence[float]
    shapes: Sequence[Shape]
    optimizer: Sequence[float]
    validation: Sequence[tuple[float, Shape]] = ()

    def for_run(self, run: RunWork) -> RunSeconds:
        """The time of a run, by the operations of its batches: long rows take more than their share of positions."""
        works = [run.work(shape) for shape in self.shapes]
        rate = sum(self.micro) / sum(works)
        optimizer = statistics.median(self.optimizer)
        training = rate * run.micro_batches * run.work.mean(run.shapes) + run.steps * optimizer
        validation = 0.0
        if self.validation and run.validation.shapes:
            of_work = statistics.median(seconds / run.work(shape) for seconds, shape in self.validation)
            validation = of_work * run.validation_batches * run.work.mean(run.validation.shapes)
        is_fewer = statistics.fmean(shape.rows for shape in self.shapes) < 0.9 * max(shape.rows for shape in run.shapes)
        total, relative = training + validation, self._relative(works, rate, is_fewer)
        rows = " of fewer rows" if is_fewer else ""
        how = f"{len(self.micro)} batches{rows} timed here, scaled by their operations: +- {relative:.0%}"
        low, high = total * max(0.0, 1 - relative), total * (1 + relative)
        return RunSeconds(total, low, high, training / max(1, run.steps), validation, TIMED, how, run.passes or 0)

    def _relative(self, works: Sequence[float], rate: float, is_fewer: bool) -> float:
        """Half the width of the interval of the total, relative to it."""
        count = len(self.micro)
        if count == 1:
            return 0.5
        residuals = [taken - rate * work for taken, work in zip(self.micro, works, strict=True)]
        error = math.sqrt(sum(residual**2 for residual in residuals) / (count - 1) / count)
        spread = t_quantile(0.975, count - 1) * error / statistics.fmean(self.micro)
        return math.hypot(spread, OTHER_MINUTES, OTHER_ROWS if is_fewer else 0.0)


def time_steps(
    module: LightningModule,
    datamodule: LightningDataModule,
    trainer: Mapping[str, Any] | None = None,
    *,
    rows: int | None = None,
    batches: int = 8,
    max_seconds: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes | None:
    """Train a copy of ``module`` for a few batches, and time them; None if it does not fit into memory.

    The module, the data module, random generators and files stay as they are. Each batch is an optimizer step, whatever
    the accumulation of the run; both parts are timed apart.

    Args:
        module: The module of the run; if it is not built, its copy is built as ``fit`` builds it.
        datamodule: The data module of the run.
        trainer: Settings of the run's Trainer that change a step: ``precision``, ``gradient_clip_val``,
            ``accelerator``. Others are left out.
        rows: Rows of a batch. None takes the data module's own.
        batches: Batches to time, after two that are not counted.
        max_seconds: No batch is begun after so many seconds; two are always timed.
        clock: Gives seconds.
    """
    watch = Stopwatch(batches, max_seconds, clock)
    given = trainer or {}
    options = {name: given[name] for name in _STEP_OPTIONS if given.get(name) is not None}
    with _unseen(), ending_at_once(), tempfile.TemporaryDirectory() as folder:
        runner = Trainer(**(_QUIET | options), default_root_dir=folder, callbacks=[watch])
        try:
            runner.fit(_copied(module), datamodule=with_rows(copy_with_generators(datamodule), rows))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
    if not watch.micro:
        return None
    return StepTimes(watch.micro, watch.shapes, watch.optimizer, watch.validation[1:])


_STEP_OPTIONS = (
    "accelerator",
    "precision",
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


def _copied(module: LightningModule) -> LightningModule:
    trainer = attached_trainer(module)
    module.trainer = None
    try:
        return copy.deepcopy(module)
    finally:
        module.trainer = trainer


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep the random state, and say nothing of a run that does not count."""
    with isolate_rng(), warnings.catch_warnings(), messages_from(logging.ERROR):
        warnings.simplefilter("ignore")
        yield
