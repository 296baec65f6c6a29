"""How long a study will take, before it starts: by the plan of one run."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from lightning_lora.cli.study.fit_config import fit_objects
from lightning_lora.errors import LoRAError
from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.planner import TYPICAL_SWEEP
from lightning_lora.study.matched.spec import StudySpec

_LENGTH = ("max_epochs", "max_steps", "limit_train_batches", "precision", "accelerator", "accumulate_grad_batches")


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
    trainer = {name: value for name in _LENGTH if (value := option_of(config, f"trainer.{name}")) is not None}
    rows = (option_of(config, "data.init_args.batch_size") or 1) * trainer.get("accumulate_grad_batches", 1)
    try:
        module, data = fit_objects(config)
        made = plan(module, data, devices=1, target_batch_size=rows, trainer=trainer)
    except LoRAError:
        return None
    if made.seconds is None:
        return None
    per_arm = TYPICAL_SWEEP * len(spec.selection_seeds) + spec.plan.looks[0]
    runs = 1 + per_arm * len(spec.arms) + len(spec.aa_seeds)
    return Estimate(runs, int(made.settings["steps"]), made.seconds)
