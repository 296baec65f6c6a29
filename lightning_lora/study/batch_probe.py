"""Finds the batches that learn less from the same rows, by short branches from one snapshot.

A noise scale predicts the cost of a batch from a model of stochastic gradients. A probe measures it, by training.

References:
    Merrill et al., *Critical Batch Size Revisited*, 2025, https://arxiv.org/abs/2505.23971 (branched training)
    Malladi et al., *On the SDEs and Scaling Rules for Adaptive Gradient Algorithms*, 2022,
    https://arxiv.org/abs/2205.10287 (the square-root rule)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.batch.calibration import PROBE_FILE
from lightning_lora.callbacks.batch_size_monitor import BatchSizeMonitor
from lightning_lora.errors import ProbeError, check_arguments
from lightning_lora.study.batch_branches import BatchBranches, compare_batches
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.probe import Probe
from lightning_lora.study.row_losses import HeldOut
from lightning_lora.trainer_access import found


class BatchProbe(Probe[BatchBranches, BatchProbeResult]):
    """Trains short branches with several batches from one snapshot, and finds the largest harmless batch.

    All branches train on the same rows in the same order: the rows that the run would see next, if its sampler can tell
    (`next_rows`). Learning rates follow the batch by the square-root rule, and for smaller batches the second decay of
    Adam keeps its half-life in rows (`fit_to_batch`). The learning rate falls to zero in the last fifth of a branch.
    Branches are compared in pairs, by the losses of single held-out rows: a batch costs nothing if the interval
    of its mean loss lies within 0.005 nats, and is worse if the whole interval is above zero; else nobody can tell.
    A study (``studies/batch_size.yaml``) compares whole runs with several seeds, and LoRA with full fine-tuning.

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
        stop: Whether to end the run after the probe.

    Attributes:
        result: The latest `BatchProbeResult`, or None.

    Raises:
        ConfigError: If a setting is outside its range, or the run cannot be probed.
        DataError: If there are no validation rows, or too few training rows.
    """

    compared = "batch"
    elsewhere = "drop it, and run lightning-lora probe on one device."

    def __init__(
        self,
        at: float = 0.3,
        ratios: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
        min_steps: int = 64,
        min_epoch: float = 0.05,
        held_out_rows: int = 512,
        stop: bool = False,
    ) -> None:
        check_arguments(BatchProbe, locals(), ProbeError)
        super().__init__(at, min_steps, min_epoch, held_out_rows, stop)
        if len(ratios) < 2 or not all(0 < ratio < math.inf for ratio in ratios):
            raise ProbeError(f"ratios must be at least two positive numbers, got {list(ratios)}.")
        self.ratios = tuple(ratios)

    @override
    def _branches(self, batch_rows: int, available: int) -> BatchBranches:
        return BatchBranches.planned(batch_rows, self.ratios, self.min_steps, self.min_epoch, available)

    @override
    def _compare(
        self, point: BranchPoint, branches: BatchBranches, rows: Sequence[Any], held_out: HeldOut
    ) -> BatchProbeResult:
        return compare_batches(branches, point, rows, held_out)

    @override
    def _report(self, trainer: Trainer, result: BatchProbeResult) -> None:
        monitor = found(trainer, BatchSizeMonitor)
        estimate = monitor.estimate if monitor is not None else None
        scale = estimate.value if estimate is not None and estimate.conclusive else None
        result = self.result = replace(result, noise_scale=scale)
        lines = [str(result)]
        if monitor is not None and result.calibration is not None:
            factor = result.calibration
            monitor.calibrate(trainer, factor)
            lines.append(f"  noise scale {scale:.3g} rows: the monitor continues with calibration {factor:.3g}")
        elif monitor is not None:
            unknown = "noise scale was inconclusive" if scale is None else "answer is open"
            lines.append(f"  the {unknown}, so the monitor could not be calibrated.")
        rank_zero_info("\n".join(lines))
        self._write(result, trainer.global_step)

    def _write(self, result: BatchProbeResult, step: int) -> None:
        if self._events.folder is not None:
            from lightning_lora.study.probe_plots import draw_probe  # matplotlib is slow to import

            result.save(self._events.folder / PROBE_FILE)
            draw_probe(result, (self._events.folder / PROBE_FILE).with_suffix(".png"))
        losses = {f"loss/{batch}": loss for batch, loss in result.losses.items()}
        answer = {"largest_harmless": result.largest_harmless, **losses}
        self._events.write("batch_probe", step, answer | {"bound": result.bound, "calibration": result.calibration})
