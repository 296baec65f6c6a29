"""What probes share: when a run is probed, what it must be like for that, and the rows that branches are scored on."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.batch.run_events import RunEvents
from lightning_lora.capacity.fixed_rows import validation_loaders
from lightning_lora.errors import ProbeError, ResultFileError
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.branch import BranchPoint, check_one_optimizer
from lightning_lora.study.rank_probe_result import RankProbeResult
from lightning_lora.study.row_losses import HeldOut, check_gives_losses
from lightning_lora.study.row_order import check_loader, next_rows, rows_per_batch
from lightning_lora.study.snapshot import copy_module, isolated
from lightning_lora.trainer_access import move_last

Branches = TypeVar("Branches")
Result = TypeVar("Result", BatchProbeResult, RankProbeResult)


class Probe(Callback, ABC, Generic[Branches, Result]):
    """Trains short branches from a snapshot of a run, once, and continues the run as if nothing had been.

    Args:
        at: The step to probe after: a fraction of the planned optimizer steps if below 1, else a number of steps.
        min_steps: Least number of optimizer steps of a branch.
        min_epoch: Least fraction of the training rows that a branch trains on.
        held_out_rows: Validation rows to compare on, spread evenly; all if there are fewer.
        stop: Whether to end the run after the probe.

    Attributes:
        result: The latest result, or None.
    """

    compared: ClassVar[str]
    """What the probe compares, for messages: ``"batch"`` or ``"rank"``."""
    elsewhere: ClassVar[str]
    """What to do in a run on several devices, for a message."""

    def __init__(self, at: float, min_steps: int, min_epoch: float, held_out_rows: int, stop: bool) -> None:
        if not 0 < at < math.inf or (at >= 1 and at != int(at)):
            raise ProbeError(f"at must be a fraction of the steps below 1, or a whole number of steps, got {at}.")
        if min_steps < 1 or held_out_rows < 2 or not 0 <= min_epoch <= 1:
            raise ProbeError(
                f"min_steps must be at least 1, held_out_rows at least 2 and min_epoch in [0, 1], got min_steps="
                f"{min_steps}, held_out_rows={held_out_rows}, min_epoch={min_epoch}."
            )
        self.at = at
        self.min_steps = min_steps
        self.min_epoch = min_epoch
        self.held_out_rows = held_out_rows
        self.stop = stop
        self.result: Result | None = None
        self._is_due = True
        self._step = 0

    def run(
        self,
        module: LightningModule,
        train_loader: DataLoader[Any],
        held_out_loader: DataLoader[Any],
        batch_rows: int | None = None,
        optimizer_state: Mapping[str, Any] | None = None,
        trainer_options: Mapping[str, Any] | None = None,
    ) -> Result:
        """Probe outside of a run.

        Args:
            module: The module, trained or fresh, on the device to use; it stays as it is. Its ``predict_step`` must
                return a mapping with the ``"loss"`` of each row, in nats.
            train_loader: The rows to train on. Its batches are the largest micro-batches.
            held_out_loader: The rows to compare on.
            batch_rows: Rows of an optimizer step of the run. None: a batch of ``train_loader``.
            optimizer_state: ``state_dict()`` of the module's optimizer. None: the learning rates of
                ``configure_optimizers`` without a warm-up, and fresh moments.
            trainer_options: Options for the Trainer of the branches, such as ``precision`` and ``gradient_clip_val``.

        Raises:
            ConfigError: If the module cannot be probed, has no adapters for a `RankProbe`, or if a batch of a
                `BatchProbe` would be less than a row.
            DataError: If there are too few rows.
            GradientError: If a branch diverges.
        """
        check_gives_losses(module)
        held_out = self._held_out(held_out_loader)
        with isolated(module.device, 0):
            start = copy_module(module)
            start.configure_model()  # a fresh module has no layers yet
        micro_batch = rows_per_batch(check_loader(train_loader, "training"))
        point = BranchPoint(start, optimizer_state, train_loader, micro_batch, trainer_options)
        rows = next_rows(train_loader)
        point = point.with_started_adapters(rows)
        return self._timed(point, self._branches(batch_rows or micro_batch, len(rows)), rows, held_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several devices, and move behind the other callbacks, which may watch layers until a batch ends."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy) or trainer.world_size != 1:
            raise ProbeError(
                f"{type(self).__name__} works on one device, and this run has {type(trainer.strategy).__name__} with "
                f"{trainer.world_size}: {self.elsewhere}"
            )
        move_last(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse runs that cannot be probed, before the first step."""
        check_one_optimizer(trainer, pl_module)
        check_gives_losses(pl_module)
        planned = trainer.estimated_stepping_batches
        if self.at < 1 and math.isinf(planned):
            raise ProbeError(f"at={self.at} is a fraction, and the run has no end: give a number of steps.")
        self._step = max(1, round(self.at * planned)) if self.at < 1 else int(self.at)
        if self._step > planned:
            raise ProbeError(f"at={self.at:g} is beyond the run, which has {planned:.0f} optimizer steps: lower it.")
        self._held_out(validation_loaders(trainer))
        self._check_run(trainer, pl_module)
        self._events = RunEvents(trainer, type(self).__name__)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after the step is done, when no accumulation window is open."""
        if not self._is_due or trainer.global_step < self._step or is_accumulating(trainer):
            return
        self._is_due = False
        try:
            self._probe_run(trainer, pl_module)
        except SIGTERMException:
            rank_zero_warn(f"the {self.compared} probe was cut short by SIGTERM.")  # the run answers the signal
        except Exception as error:
            if self.stop:
                raise  # the run was only for the probe
            rank_zero_warn(
                f"the {self.compared} probe failed at step {trainer.global_step}, and the run continues: {error}"
            )
        trainer.should_stop = trainer.should_stop or self.stop

    @override
    def state_dict(self) -> dict[str, Any]:
        """Whether the run is still to be probed."""
        return {"is_due": self._is_due}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Probe a resumed run only if it was not probed before; with ``stop``, always."""
        self._is_due = self.stop or state_dict["is_due"]

    @abstractmethod
    def _branches(self, batch_rows: int, available: int) -> Branches:
        """The branches from a run with ``batch_rows`` rows a step, on at most ``available`` rows."""

    @abstractmethod
    def _compare(self, point: BranchPoint, branches: Branches, rows: Sequence[Any], held_out: HeldOut) -> Result:
        """Train the branches on ``rows`` and compare them."""

    @abstractmethod
    def _report(self, trainer: Trainer, result: Result) -> None:
        """Tell and write the result of a run, which is ``self.result`` too."""

    def _check_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise an error if the run cannot be probed."""
        self._branches_of_run(trainer)

    def _probe_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Probe the run as it is now, and report the result."""
        point, rows = self._point_of_run(trainer, module)
        held_out = self._held_out(trainer.val_dataloaders)
        found = self._timed(point, self._branches_of_run(trainer), rows, held_out)
        self.result = replace(found, step=trainer.global_step)
        self._report(trainer, self.result)

    def _timed(self, point: BranchPoint, branches: Branches, rows: Sequence[Any], held_out: HeldOut) -> Result:
        started = time.perf_counter()
        result = self._compare(point, branches, rows, held_out)
        self.result = replace(result, seconds=time.perf_counter() - started)
        return self.result

    def _branches_of_run(self, trainer: Trainer) -> Branches:
        loader = check_loader(trainer.train_dataloader, "training")
        return self._branches(rows_per_batch(loader) * trainer.accumulate_grad_batches, len(next_rows(loader)))

    @staticmethod
    def _point_of_run(trainer: Trainer, module: LightningModule) -> tuple[BranchPoint, list[int]]:
        """The point that branches of a run start from, and the rows that it would train on next."""
        loader = check_loader(trainer.train_dataloader, "training")
        options = {
            "plugins": [trainer.precision_plugin],
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        }
        point = BranchPoint(module, trainer.optimizers[0].state_dict(), loader, rows_per_batch(loader), options)
        return point, next_rows(loader, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _held_out(self, loader: object) -> HeldOut:
        """Held-out rows spread evenly over the dataset, which may be sorted."""
        if isinstance(loader, (list, tuple)) and len(loader) == 1:
            loader = loader[0]
        if loader is None or (isinstance(loader, list) and not loader):
            raise ResultFileError("a probe compares branches on held-out rows: give the run validation data.")
        loader = check_loader(loader, "validation")
        count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        if count < 2:
            raise ResultFileError(
                f"a probe compares branches on held-out rows, got {count}: give at least 256 of them."
            )
        number = min(count, self.held_out_rows)
        return loader, [place * count // number for place in range(number)]
