"""Finds out whether more rank helps, by two short branches from one snapshot: one at twice the rank, one without.

What a monitor calls saturated may be failed training, or a learning rate that is still high. A probe raises the rank
and trains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.errors import ProbeError
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.probe import Probe
from lightning_lora.study.rank_branches import RankBranches, raised_ranks
from lightning_lora.study.rank_probe_result import RANK_PROBE_FILE, RankProbeResult
from lightning_lora.study.row_losses import check_gives_losses
from lightning_lora.study.row_order import check_loader, next_rows, rows_per_batch
from lightning_lora.study.snapshot import copy_module, isolated


class RankProbe(Probe):
    """Raises the rank of all adapters in a short branch, and compares it with a branch that keeps the rank.

    Both branches start from the same snapshot and train on the same rows in the same order, with fresh moments of the
    optimizer and the present learning rate, which falls to zero in the last fifth. Growth changes neither what the
    module computes nor the scale of its updates: the new columns of B are zero. The branches are compared in pairs, by
    the losses of single held-out rows. More rank is confirmed to help if the whole interval of its gain is above zero,
    and not confirmed if the gain with its interval lies within 0.005 nats, or below; else nobody can tell.

    Model, optimizer, schedules, random numbers and the place in the data stay as they are. Use it in a run, as a
    callback; on the command line, by `lightning-lora probe --rank`; or outside of a run, by `run`. In a run it prints
    the result, and writes ``rank_probe.json``, a picture ``rank_probe.png`` and a line of ``events.jsonl`` into the run
    folder. If it fails, one warning says so and the run continues, unless ``stop`` is set.

    Args:
        at: The step to probe after: a fraction of the planned optimizer steps if below 1, else a number of steps. A run
            resumed from a later step probes after its first step.
        min_steps: Least number of optimizer steps of each branch.
        min_epoch: Least fraction of the training rows that each branch trains on.
        held_out_rows: Validation rows to compare on, spread evenly; all if there are fewer. Use at least 256.
        num_seeds: Number of orders of the data to repeat both branches with: the run's own order, then shuffled ones.
        factor: What ranks are multiplied with, at least 2; a weight gets its full rank at most.
        stop: Whether to end the run after the probe.

    Attributes:
        result: The latest `RankProbeResult`, or None.

    Raises:
        ConfigError: If a setting is outside its range, nothing is adapted, or the run cannot be probed.
        DataError: If there are no validation rows, or too few training rows.
    """

    compared = "rank"
    elsewhere = "drop it, and run lightning-lora probe --rank on one device."

    def __init__(
        self,
        at: float = 0.5,
        min_steps: int = 64,
        min_epoch: float = 0.05,
        held_out_rows: int = 512,
        num_seeds: int = 1,
        factor: int = 2,
        stop: bool = False,
    ) -> None:
        super().__init__(at, min_steps, min_epoch, held_out_rows, stop)
        if num_seeds < 1:
            raise ProbeError(f"num_seeds must be at least 1, got {num_seeds}.")
        self.num_seeds = num_seeds
        if factor < 2:
            raise ProbeError(f"factor must be at least 2, got {factor}.")
        self.factor = factor
        self.result: RankProbeResult | None = None

    def run(
        self,
        module: LightningModule,
        train_loader: DataLoader[Any],
        held_out_loader: DataLoader[Any],
        batch_rows: int | None = None,
        optimizer_state: Mapping[str, Any] | None = None,
        trainer_options: Mapping[str, Any] | None = None,
    ) -> RankProbeResult:
        """Probe outside of a run.

        Args:
            module: The module, trained or fresh, on the device to use; it stays as it is. Its ``predict_step`` must
                return a mapping with the ``"loss"`` of each row, in nats.
            train_loader: The rows to train on. Its batches are the largest micro-batches.
            held_out_loader: The rows to compare on.
            batch_rows: Rows of an optimizer step. None: a batch of ``train_loader``.
            optimizer_state: ``state_dict()`` of the module's optimizer, for its learning rate. None: the learning rates
                of ``configure_optimizers`` without a warm-up.
            trainer_options: Options for the Trainer of the branches, such as ``precision`` and ``gradient_clip_val``.

        Raises:
            ConfigError: If the module has no adapters, or cannot be probed.
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
        return self._probe(point, self._branches(batch_rows or micro_batch, len(rows)), rows, held_out)

    @override
    def _check_run(self, trainer: Trainer, module: LightningModule) -> None:
        raised_ranks(module, self.factor)
        self._branches_of_run(trainer)

    @override
    def _probe_run(self, trainer: Trainer, module: LightningModule) -> None:
        point, rows = self._point_of_run(trainer, module)
        held_out = self._held_out(trainer.val_dataloaders)
        found = self._probe(point, self._branches_of_run(trainer), rows, held_out)
        result = self.result = replace(found, step=trainer.global_step)
        rank_zero_info(str(result))
        if self._events.folder is not None:
            from lightning_lora.study.rank_probe_plot import draw_rank_probe  # matplotlib is slow to import

            result.save(self._events.folder / RANK_PROBE_FILE)
            draw_rank_probe(result, (self._events.folder / RANK_PROBE_FILE).with_suffix(".png"))
        numbers = {name: getattr(result, name) for name in ("rank", "grown_rank", "gain", "error", "verdict")}
        self._events.write("rank_probe", trainer.global_step, numbers)

    def _probe(self, point: BranchPoint, branches: RankBranches, rows: Any, held_out: Any) -> RankProbeResult:
        started = time.perf_counter()
        result = branches.compare(point, rows, held_out)
        self.result = replace(result, seconds=time.perf_counter() - started)
        return self.result

    def _branches_of_run(self, trainer: Trainer) -> RankBranches:
        loader = check_loader(trainer.train_dataloader, "training")
        return self._branches(rows_per_batch(loader) * trainer.accumulate_grad_batches, len(next_rows(loader)))

    def _branches(self, batch_rows: int, available: int) -> RankBranches:
        return RankBranches.planned(batch_rows, self.min_steps, self.min_epoch, available, self.num_seeds, self.factor)
