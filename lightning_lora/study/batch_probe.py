"""Finds the batches that learn less from the same rows, by short branches from one snapshot.

A noise scale predicts the cost of a batch from a model of stochastic gradients. A probe measures it, by training.

References:
    Merrill et al., *Critical Batch Size Revisited*, 2025, https://arxiv.org/abs/2505.23971 (branched training)
    Malladi et al., *On the SDEs and Scaling Rules for Adaptive Gradient Algorithms*, 2022,
    https://arxiv.org/abs/2205.10287 (the square-root rule)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.batch.calibration import PROBE_FILE
from lightning_lora.batch.run_events import RunEvents
from lightning_lora.callbacks.batch_size_monitor import BatchSizeMonitor
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.study.batch_branches import BatchBranches, compare_batches
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.branch import BranchPoint, check_one_optimizer
from lightning_lora.study.row_losses import HeldOut, check_gives_losses
from lightning_lora.study.row_order import check_loader, next_rows, rows_per_batch
from lightning_lora.study.snapshot import copy_module, isolated
from lightning_lora.trainer_access import found, move_last


class BatchProbe(Callback):
    """Trains short branches with several batches from one snapshot, and finds the largest harmless batch.

    All branches train on the same rows in the same order: the rows that the run would see next, if its sampler can tell
    (`next_rows`). Learning rates follow the batch by the square-root rule, and for smaller batches the second decay of
    Adam keeps its half-life in rows (`fit_to_batch`). The learning rate falls to zero in the last fifth of a branch.
    Branches are compared in pairs, by the losses of single held-out rows. A batch is worse if its mean loss is higher
    by more than 0.005 nats and two standard errors.

    Model, optimizer, schedules, random numbers and the place in the data stay as they are. Use it in a run, as a
    callback; on the command line, by `lightning-lora probe`; or outside of a run, by `run`.

    In a run it prints the result, writes ``batch_probe.json``, a picture ``batch_probe.png`` and a line of
    ``events.jsonl`` into the run folder, and calibrates a `BatchSizeMonitor` among the callbacks. If it fails, one
    warning says so and the run continues, unless ``stop`` is set.

    Args:
        at: The step to probe after: a fraction of the planned optimizer steps if below 1, else a number of steps. A run
            resumed from a later step probes after its first step.
        ratios: Batches to try, as multiples of the run's effective batch.
        min_steps: Least number of optimizer steps of the branch with the largest batch.
        min_epoch: Least fraction of the training rows that each branch trains on.
        held_out_rows: Validation rows to compare on, spread evenly; all if there are fewer. Use at least 256.
        num_seeds: Number of orders of the data to repeat every branch with: the run's own order, then shuffled ones.
        full_ft: Whether to train branches of full fine-tuning too: adapters are merged and removed, and every weight is
            trained at the present learning rate over ``lr_multiplier``. All branches then start with fresh moments.
        stop: Whether to end the run after the probe.

    Attributes:
        result: The latest `BatchProbeResult`, or None.

    Raises:
        ConfigError: If a setting is outside its range, or the run cannot be probed.
        DataError: If there are no validation rows, or too few training rows.
    """

    def __init__(
        self,
        at: float = 0.3,
        ratios: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
        min_steps: int = 64,
        min_epoch: float = 0.05,
        held_out_rows: int = 512,
        num_seeds: int = 1,
        full_ft: bool = False,
        stop: bool = False,
    ) -> None:
        if not 0 < at < math.inf or (at >= 1 and at != int(at)):
            raise ConfigError(f"at must be a fraction of the steps below 1, or a whole number of steps, got {at}.")
        if len(ratios) < 2 or not all(0 < ratio < math.inf for ratio in ratios):
            raise ConfigError(f"ratios must be at least two positive numbers, got {list(ratios)}.")
        if min_steps < 1 or held_out_rows < 2 or num_seeds < 1 or not 0 <= min_epoch <= 1:
            raise ConfigError(
                f"min_steps and num_seeds must be at least 1, held_out_rows at least 2 and min_epoch in [0, 1], got "
                f"min_steps={min_steps}, num_seeds={num_seeds}, held_out_rows={held_out_rows}, min_epoch={min_epoch}."
            )
        self.at = at
        self.ratios = tuple(ratios)
        self.min_steps = min_steps
        self.min_epoch = min_epoch
        self.held_out_rows = held_out_rows
        self.num_seeds = num_seeds
        self.full_ft = full_ft
        self.stop = stop
        self.result: BatchProbeResult | None = None
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
    ) -> BatchProbeResult:
        """Probe outside of a run.

        Args:
            module: The module, trained or fresh, on the device to use; it stays as it is. Its ``predict_step`` must
                return a mapping with the ``"loss"`` of each row, in nats.
            train_loader: The rows to train on. Its batches are the largest micro-batches.
            held_out_loader: The rows to compare on.
            batch_rows: Rows of an optimizer step that ratios are multiples of. None: a batch of ``train_loader``.
            optimizer_state: ``state_dict()`` of the module's optimizer. None: the learning rates of
                ``configure_optimizers`` without a warm-up, and fresh moments.
            trainer_options: Options for the Trainer of the branches, such as ``precision`` and ``gradient_clip_val``.

        Raises:
            ConfigError: If a batch would be less than a row, or the module cannot be probed.
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
        return self._probe(point, self._branches(batch_rows or micro_batch, len(rows)), rows, held_out)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several devices, and move behind the other callbacks, which may watch layers until a batch ends."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy) or trainer.world_size != 1:
            raise ConfigError(
                f"BatchProbe works on one device, and this run has {type(trainer.strategy).__name__} with "
                f"{trainer.world_size}: drop it, and run lightning-lora probe on one device."
            )
        move_last(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse runs that cannot be probed, before the first step."""
        check_one_optimizer(trainer, pl_module)
        check_gives_losses(pl_module)
        planned = trainer.estimated_stepping_batches
        if self.at < 1 and math.isinf(planned):
            raise ConfigError(f"at={self.at} is a fraction, and the run has no end: give a number of steps.")
        self._step = max(1, round(self.at * planned)) if self.at < 1 else int(self.at)
        if self._step > planned:
            raise ConfigError(f"at={self.at:g} is beyond the run, which has {planned:.0f} optimizer steps: lower it.")
        if trainer.val_dataloaders is None and trainer.enable_validation:
            # Lightning makes it in the first epoch that ends with a validation.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        self._held_out(trainer.val_dataloaders)
        self._branches_of_run(trainer)
        self._events = RunEvents(trainer, "BatchProbe")

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
            rank_zero_warn("the batch probe was cut short by SIGTERM.")  # the run itself answers the signal
        except Exception as error:
            if self.stop:
                raise  # the run was only for the probe
            rank_zero_warn(f"the batch probe failed at step {trainer.global_step}, and the run continues: {error}")
        trainer.should_stop = trainer.should_stop or self.stop

    @override
    def state_dict(self) -> dict[str, Any]:
        """Whether the run is still to be probed."""
        return {"is_due": self._is_due}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Probe a resumed run only if it was not probed before; with ``stop``, always."""
        self._is_due = self.stop or state_dict["is_due"]

    def _probe_run(self, trainer: Trainer, module: LightningModule) -> None:
        loader, branches = self._branches_of_run(trainer)
        options = {
            "plugins": [trainer.precision_plugin],
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        }
        point = BranchPoint(module, trainer.optimizers[0].state_dict(), loader, rows_per_batch(loader), options)
        rows = next_rows(loader, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        held_out = self._held_out(trainer.val_dataloaders)
        monitor = found(trainer, BatchSizeMonitor)
        estimate = monitor.estimate if monitor is not None else None
        scale = estimate.value if estimate is not None and estimate.conclusive else None
        outcome = self._probe(point, branches, rows, held_out)
        result = self.result = replace(outcome, step=trainer.global_step, noise_scale=scale)
        lines = [str(result)]
        if monitor is not None and result.calibration is not None:
            factor = result.calibration
            monitor.calibrate(trainer, factor)
            lines.append(f"  noise scale {scale:.3g} rows: the monitor continues with calibration {factor:.3g}")
        elif monitor is not None:
            lines.append("  the noise scale was inconclusive, so the monitor could not be calibrated.")
        rank_zero_info("\n".join(lines))
        self._write(result, trainer.global_step)

    def _write(self, result: BatchProbeResult, step: int) -> None:
        if self._events.folder is not None:
            from lightning_lora.study.batch_probe_plot import draw_probe  # matplotlib is slow to import

            result.save(self._events.folder / PROBE_FILE)
            draw_probe(result, (self._events.folder / PROBE_FILE).with_suffix(".png"))
        losses = {f"loss/{batch}": loss for batch, loss in result.losses.items()}
        answer = {"largest_harmless": result.largest_harmless, **losses}
        self._events.write("batch_probe", step, answer | {"bound": result.bound, "calibration": result.calibration})

    def _probe(
        self, point: BranchPoint, branches: BatchBranches, rows: Sequence[Any], held_out: HeldOut
    ) -> BatchProbeResult:
        started = time.perf_counter()
        result = compare_batches(branches, point, rows, held_out, self.full_ft)
        self.result = replace(result, seconds=time.perf_counter() - started)
        return self.result

    def _branches(self, batch_rows: int, available: int) -> BatchBranches:
        return BatchBranches.planned(batch_rows, self.ratios, self.min_steps, self.min_epoch, available, self.num_seeds)

    def _branches_of_run(self, trainer: Trainer) -> tuple[DataLoader[Any], BatchBranches]:
        loader = check_loader(trainer.train_dataloader, "training")
        batch_rows = rows_per_batch(loader) * trainer.accumulate_grad_batches
        return loader, self._branches(batch_rows, len(next_rows(loader)))

    def _held_out(self, loader: object) -> HeldOut:
        """Held-out rows spread evenly over the dataset, which may be sorted."""
        if isinstance(loader, (list, tuple)) and len(loader) == 1:
            loader = loader[0]
        if loader is None or (isinstance(loader, list) and not loader):
            raise DataError("a probe compares batches on held-out rows: give the run validation data.")
        loader = check_loader(loader, "validation")
        count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        if count < 2:
            raise DataError(f"a probe compares batches on held-out rows, got {count}: give at least 256 of them.")
        number = min(count, self.held_out_rows)
        return loader, [place * count // number for place in range(number)]
