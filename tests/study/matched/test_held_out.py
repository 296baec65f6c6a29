"""Every run is scored on all held-out rows, whatever its own validations take."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_lora.study.matched.held_out import held_out_losses
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

pytestmark = toys.expected_warnings


class NoRows(Learner):
    """Tells its loss by ``validation_step`` alone."""

    predict_step = LightningModule.predict_step


class SmallBatches(Rows):
    """Validates in batches of 4."""

    def val_dataloader(self) -> Any:
        loader = super().val_dataloader()
        return type(loader)(loader.dataset, 4)


@pytest.mark.parametrize("module", [Learner, NoRows])
@pytest.mark.parametrize("limits", [{"limit_val_batches": 1, "limit_predict_batches": 1}, {"limit_val_batches": 0}])
def test_limits_of_a_trainer_take_no_held_out_row_away(module: type[Learner], limits: dict[str, Any]) -> None:
    def losses(**options: Any) -> tuple[float, float, str]:
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **options)
        rows, content = held_out_losses(trainer, module(0.1), SmallBatches())
        return rows.mean("selection"), rows.mean("verdict"), content

    assert losses(**limits) == losses()
