"""Finds out whether more rank helps, by two short branches from one snapshot: one at twice the rank, one without.

What a monitor calls saturated may be failed training, or a learning rate that is still high. A probe raises the rank
and trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import ProbeError, check_arguments
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.probe import Probe
from lightning_lora.study.rank_branches import RankBranches, raised_ranks
from lightning_lora.study.rank_probe_result import RANK_PROBE_FILE, RankProbeResult
from lightning_lora.study.row_losses import HeldOut


class RankProbe(Probe[RankBranches, RankProbeResult]):
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
        check_arguments(RankProbe, locals(), ProbeError)
        super().__init__(at, min_steps, min_epoch, held_out_rows, stop)
        if num_seeds < 1:
            raise ProbeError(f"num_seeds must be at least 1, got {num_seeds}.")
        self.num_seeds = num_seeds
        if factor < 2:
            raise ProbeError(f"factor must be at least 2, got {factor}.")
        self.factor = factor

    @override
    def _check_run(self, trainer: Trainer, module: LightningModule) -> None:
        raised_ranks(module, self.factor)
        super()._check_run(trainer, module)

    @override
    def _branches(self, batch_rows: int, available: int) -> RankBranches:
        return RankBranches.planned(batch_rows, self.min_steps, self.min_epoch, available, self.num_seeds, self.factor)

    @override
    def _compare(
        self, point: BranchPoint, branches: RankBranches, rows: Sequence[Any], held_out: HeldOut
    ) -> RankProbeResult:
        return branches.compare(point, rows, held_out)

    @override
    def _report(self, trainer: Trainer, result: RankProbeResult) -> None:
        rank_zero_info(str(result))
        if self._events.folder is not None:
            from lightning_lora.study.probe_plots import draw_rank_probe  # matplotlib is slow to import

            result.save(self._events.folder / RANK_PROBE_FILE)
            draw_rank_probe(result, (self._events.folder / RANK_PROBE_FILE).with_suffix(".png"))
        numbers = {name: getattr(result, name) for name in ("rank", "grown_rank", "gain", "error", "verdict")}
        self._events.write("rank_probe", trainer.global_step, numbers)
