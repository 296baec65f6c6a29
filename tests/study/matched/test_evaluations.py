from __future__ import annotations

import ctypes
import math
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lora import LoRAConfig, Study
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.held_out import held_out_losses
from lightning_lora.study.matched.measures import energy
from lightning_lora.study.matched.measures.curve import read_curve
from lightning_lora.study.matched.outcomes import outcome_from_text, outcome_to_text
from lightning_lora.study.matched.worker import RunError
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

pytestmark = toys.expected_warnings
TRAINER = {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 0.5}
ARMS: dict[str, Any] = {"full": {"lora": None}, "rank 8": {"lora": LoRAConfig(rank=8, dropout=0.3)}}


class Kept(Learner):
    """Draws random numbers in training and in evaluation, and keeps its weights."""

    weights: Tensor

    def losses(self, batch: list[Tensor]) -> Tensor:
        noise = torch.rand(1) if not self.training else 0.01 * torch.rand(1)
        return super().losses(batch) + 0 * noise

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert all(layer.training for layer in self.modules())
        return super().training_step(batch, batch_idx) * (1 + torch.rand(()))

    def on_train_end(self) -> None:
        type(self).weights = torch.cat([p.detach().reshape(-1) for p in self.parameters()])


def outcome(folder: Path, phase: Any = "verdict", arm: str = "rank 8", **settings: Any) -> Outcome:
    made = Study(Kept, Rows, ARMS, 0.003, out=folder / "study", trainer=TRAINER, **settings)
    (folder / "run").mkdir(parents=True)
    return made._run_cell(Cell(arm, 3e-3, 5, phase, "0" * 16), folder / "run", Event())


def test_evaluations_on_a_grid_do_not_change_the_training(tmp_path: Path) -> None:
    plain = outcome(tmp_path / "plain")
    without = Kept.weights
    evaluated = outcome(tmp_path / "log", evaluations="log")
    assert torch.equal(Kept.weights, without)
    assert torch.equal(evaluated.rows.loss_sum, plain.rows.loss_sum)
    assert [step for step, _, _ in plain.evaluations] == [12, 24, 36, 48]
    steps = [step for step, _, _ in evaluated.evaluations]
    assert (steps[0], steps[-1]) == (1, 48)
    assert all(later <= max(step + 1, 1.1 * step) for step, later in pairwise(steps))
    losses = {step: loss for step, _, loss in evaluated.evaluations}
    assert all(losses[step] == pytest.approx(loss, rel=1e-6) for step, _, loss in plain.evaluations if step in losses)
    assert losses[48] == pytest.approx(float(evaluated.rows.loss_sum.sum() / evaluated.rows.tokens.sum()), rel=1e-6)
    points = [point for point in read_curve(tmp_path / "log" / "run" / "curve.csv") if point.val_loss is not None]
    assert [(point.step, point.tokens, point.val_loss) for point in points] == list(evaluated.evaluations)
    assert not evaluated.rate_fell


def test_the_untrained_base_is_the_evaluation_at_step_0(tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("log", {"evaluations": 1.3})):
        base = outcome(tmp_path / name, "base", "untrained base", **settings)
        ((step, tokens, loss),) = base.evaluations
        assert (step, tokens) == (0, 0)
        assert loss == pytest.approx(float(base.rows.loss_sum.sum() / base.rows.tokens.sum()), rel=1e-6)


def test_a_falling_rate_is_noticed(tmp_path: Path) -> None:
    class Decays(Learner):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    made = Study(Decays, Rows, ARMS, 0.003, out=tmp_path / "study", trainer=TRAINER)
    assert made._run_cell(Cell("full", 3e-3, 5, "verdict", "0" * 16), tmp_path, Event()).rate_fell


def test_evaluations_without_losses_of_rows_are_one_error(tmp_path: Path) -> None:
    class Unscored(Learner):
        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().predict_step(batch, batch_idx)["loss"]

    made = Study(Unscored, Rows, ARMS, 0.003, out=tmp_path / "study", trainer=TRAINER, evaluations="log")
    with pytest.raises(RunError, match=r"Unscored\.predict_step must return a mapping with the 'loss' of each row"):
        made._run_cell(Cell("full", 3e-3, 5, "verdict", "0" * 16), tmp_path, Event())


@pytest.mark.parametrize(("phase", "settings"), [("rung", {"halving": True}), ("verdict", {"evaluations": "log"})])
def test_steps_that_a_module_takes_by_itself_cannot_be_planned(
    phase: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    class Manual(Learner):
        def __init__(self, learning_rate: float, lora: LoRAConfig | None = None) -> None:
            super().__init__(learning_rate, lora)
            self.automatic_optimization = False

    made = Study(Manual, Rows, ARMS, 0.003, out=tmp_path / "study", trainer=TRAINER, **settings)
    with pytest.raises(RunError, match="Manual steps its optimizers itself, as often as it likes, and halving"):
        made._run_cell(Cell("full", 3e-3, 5, phase, "0" * 16), tmp_path, Event())


def test_the_curve_has_the_loss_of_all_micro_batches_of_a_step(tmp_path: Path) -> None:
    arms = {"two": {"lora": None, "trainer": {"accumulate_grad_batches": 2}}, "one": {"lora": None}}
    losses: dict[str, list[float]] = {}
    for name, arm in arms.items():  # at a rate at which no step changes anything
        made = Study(
            Learner,
            Rows,
            {name: arm, "other": {"lora": LoRAConfig(rank=1)}},
            0.003,
            out=tmp_path / f"s{name}",
            trainer=TRAINER,
        )
        (folder := tmp_path / name).mkdir()
        made._run_cell(Cell(name, 1e-30, 5, "verdict", "0" * 16), folder, Event())
        losses[name] = [point.train_loss for point in read_curve(folder / "curve.csv") if point.train_loss is not None]
    pairs = torch.tensor(losses["one"]).view(-1, 2)
    assert losses["two"] == pytest.approx(pairs.mean(1).tolist(), rel=1e-5)


def test_what_a_run_has_measured_survives_the_database(tmp_path: Path) -> None:
    found = outcome(tmp_path, evaluations=2)
    again = outcome_from_text(outcome_to_text(found))
    assert again.evaluations == found.evaluations
    assert isinstance(again.evaluations[0], tuple)
    assert (again.energy_joules, again.rate_fell) == (None, False)
    assert math.isfinite(again.evaluations[-1][2])


def test_the_energy_of_a_gpu_is_that_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: the driver's counter is in millijoules, and a code other than 0 means that it does not tell."""

    class Driver:
        code = 0

        def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
            assert name == b"GPU-1234"
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, used: Any) -> int:
            ctypes.cast(used, ctypes.POINTER(ctypes.c_ulonglong))[0] = 2500
            return self.code

    class Properties:
        uuid = "1234"

    driver = Driver()
    monkeypatch.setattr(energy, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    assert energy.joules(torch.device("cuda:0")) == 2.5
    assert energy.joules(torch.device("cpu")) is None
    driver.code = 3
    assert energy.joules(torch.device("cuda:0")) is None
    monkeypatch.setattr(energy, "_driver", lambda: None)
    assert energy.joules(torch.device("cuda:0")) is None


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
