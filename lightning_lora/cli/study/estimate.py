"""How long a study will take, before it starts: by the plan of one run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lightning_lora.cli.study.arms import fit_objects
from lightning_lora.errors import LoRAError
from lightning_lora.study.matched.planner import TYPICAL_SWEEP
from lightning_lora.study.matched.spec import StudySpec


@dataclass(frozen=True)
class Estimate:
    """The time of a study.

    Args:
        runs: Number of runs, as sweeps mostly go.
        steps: Optimizer steps of each.
        run_seconds: Seconds of training of a run of the baseline.
    """

    runs: int
    steps: int
    run_seconds: float

    @property
    def total_seconds(self) -> float:
        """Seconds of training of all runs, for one worker."""
        return self.runs * self.run_seconds


def estimate(spec: StudySpec) -> Estimate | None:
    """Estimate the time of a study by `plan` of its baseline; None where no plan can be made of its module and data."""
    from lightning_lora.planning.make_plan import plan

    config = copy.deepcopy(dict(spec.arm(spec.baseline).config))
    try:
        module, data = fit_objects(config)
        trainer: dict[str, Any] = {
            name: value
            for name, value in (config.get("trainer") or {}).items()
            if value is not None and name in ("max_epochs", "max_steps", "precision", "accumulate_grad_batches")
        }
        made = plan(module, data, devices=1, trainer=trainer)
    except LoRAError:
        return None
    if made.seconds is None:
        return None
    per_arm = TYPICAL_SWEEP * len(spec.selection_seeds) + spec.plan.looks[0]
    return Estimate(1 + per_arm * len(spec.arms), int(made.settings["steps"]), made.seconds)
