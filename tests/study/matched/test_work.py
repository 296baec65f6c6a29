"""What a study says it will do is what it does, where nothing widens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import lightning_lora as ll
from lightning_lora import Study
from lightning_lora.study.matched.checks.work import planned_work
from lightning_lora.study.matched.record import UNTRAINED
from tests.study.matched import planted
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

pytestmark = toys.expected_warnings
STEPS, HELD_OUT = 72, 48
RATES = {"full": [0.03, 0.06, 0.12], "rank 8": [0.0007, 0.0014, 0.0028]}
SETTINGS: dict[str, dict[str, Any]] = {
    "noise floor": {"aa": True},
    "evaluations and halving": {"halving": True, "evaluations": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_planned_steps_and_passes_are_those_that_are_run(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [0]

    class Counted(Learner):
        def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            rows[0] += len(batch[0])
            return super().predict_step(batch, batch_idx)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            rows[0] += len(batch[0]) * (self.trainer.state.fn != "fit")
            super().validation_step(batch, batch_idx)

    arms = {"full": {"lora": None}, "rank 8": {"lora": ll.LoRAConfig(rank=8)}}
    trainer = {"accelerator": "cpu", "max_epochs": 3}
    # The best rates are in the middle, and with so wide a band no rate between is tried.
    study = Study(
        Counted,
        Rows,
        arms,
        RATES,
        band=5.0,
        seeds=1,
        selection_seeds=[0, 7],
        out=tmp_path / "out",
        trainer=trainer,
        **settings,
    )
    low, mostly, high = planned_work(study.spec, dict.fromkeys(arms, STEPS))
    record = study.run()
    trained = [cell for cell in record.cells if cell.arm != UNTRAINED and cell.phase != "rung"]
    steps = sum(cell.steps or 0 for cell in trained)
    assert (low.runs, low.steps, low.lengths, low.passes) == (
        len(trained) + 1,
        steps,
        steps / STEPS,
        rows[0] / HELD_OUT,
    )
    assert low.runs < mostly.runs < high.runs
    assert low.passes < mostly.passes < high.passes


def test_the_range_has_widening_halving_and_further_looks() -> None:
    spec = planted.spec(seeds="auto", halving=True)
    low, mostly, high = planned_work(spec, {arm.name: 9 for arm in spec.arms})
    count = len(spec.arms)
    assert low.runs == 1 + count * (3 + 3)
    assert mostly.runs == 1 + count * (5 + 3)
    assert high.runs == 1 + count * (3 + 4 + 1 + 8)
    assert (low.steps, low.passes) == (9 * count * 6, 2 + count * (2 * 3 + 3))


def test_rates_that_may_be_given_up_count_a_third() -> None:
    spec = planted.spec(seeds=3, halving=True)
    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    spec = replace(spec, arms=tuple(replace(arm, learning_rates=rates) for arm in spec.arms))
    low, _, _ = planned_work(spec, {arm.name: 10 for arm in spec.arms})
    count = len(spec.arms)
    assert low.steps == count * (2 * 4 + 3 * 10 + 3 * 10)
    assert low.lengths == pytest.approx(count * (2 * 0.4 + 6))
    assert low.runs == 1 + count * 8
