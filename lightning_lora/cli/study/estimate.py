"""How long a study will take, before it starts: by the plan of one run, and what the study does with such runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_lora.cli.study.fit_config import fit_objects
from lightning_lora.cli.study.matched_size import LORA
from lightning_lora.errors import LoRAError
from lightning_lora.study.matched.checks.equal import rows_of_step
from lightning_lora.study.matched.checks.work import Work, planned_work
from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.spec import StudySpec

_LENGTH = (
    *("max_epochs", "max_steps", "limit_train_batches", "precision", "accelerator", "accumulate_grad_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "limit_val_batches"),
)


@dataclass(frozen=True)
class Estimate:
    """The time of a study.

    Args:
        low: What it does at least.
        mostly: What it does as sweeps mostly go.
        high: What it does at most.
        steps: Optimizer steps of a run of the baseline.
        run_seconds: Seconds of training of such a run, with the validations of ``fit``.
        pass_seconds: Seconds of a pass over the held-out rows; 0 if it is not known.
        peak_bytes: Memory of a run of the baseline; 0 if it is not known.
    """

    low: Work
    mostly: Work
    high: Work
    steps: int
    run_seconds: float
    pass_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def total_seconds(self) -> float:
        """Seconds of the whole study for one worker, as sweeps mostly go."""
        return self.seconds(self.mostly)

    def seconds(self, work: Work) -> float:
        """Seconds of training and scoring for one worker."""
        return work.lengths * self.run_seconds + work.passes * self.pass_seconds

    def with_steps(self, steps: int) -> Estimate:
        """The time with runs of so many steps."""
        share = steps / self.steps
        low, mostly, high = (
            replace(work, steps=int(work.steps * share)) for work in (self.low, self.mostly, self.high)
        )
        seconds = self.run_seconds * share
        return replace(self, low=low, mostly=mostly, high=high, steps=steps, run_seconds=seconds)


def estimate(spec: StudySpec) -> Estimate | None:
    """Estimate the time of a study by `plan` of its baseline; None where no plan can be made of its module and data."""
    from lightning_lora.planning.make_plan import plan

    config = copy.deepcopy(dict(spec.arm(spec.baseline).config))
    trainer = {name: value for name in _LENGTH if (value := option_of(config, f"trainer.{name}")) is not None}
    rows = rows_of_step(config)
    try:
        module, data = fit_objects(config)
        made = plan(module, data, devices=1, target_batch_size=rows, trainer=trainer)
    except LoRAError:
        return None
    if made.seconds is None:
        return None
    steps = int(made.settings["steps"])
    # All arms train on the same rows.
    lengths = {arm.name: math.ceil(steps * rows / rows_of_step(arm.config)) for arm in spec.arms}
    time: dict[str, Any] = made.numbers["time"]
    pass_seconds = time["validation"] / time["validations"] if time["validations"] else 0.0
    memory = made.memory.get(_method(config))
    return Estimate(
        *planned_work(spec, lengths), steps, made.seconds, pass_seconds, 0 if memory is None else memory.total
    )


def _method(config: Mapping[str, Any]) -> str:
    """What `Plan.memory` calls the way in which a config trains."""
    if not option_of(config, LORA):
        return "full"
    return "qlora" if option_of(config, "model.init_args.quantization") else "lora"
