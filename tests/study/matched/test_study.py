from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

import lightning_lora as ll
from lightning_lora import Study
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.memory.process_peak import resident_bytes
from lightning_lora.study.matched.cells import Cell
from lightning_lora.study.matched.record import UNTRAINED, StudyRecord, read_study
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

pytestmark = [*toys.expected_warnings, pytest.mark.slow]
ARMS: dict[str, Any] = {"full": {"lora": None}, "rank 8": {"lora": ll.LoRAConfig(rank=8)}}
RATES = {"full": [0.03, 0.06, 0.12], "rank 8": [0.0007, 0.0014, 0.0028]}
TRAINER = {"accelerator": "cpu", "max_epochs": 3}


def study(out: Path, **settings: Any) -> Study:
    given: dict[str, Any] = {"arms": ARMS, "learning_rates": RATES, "band": 0.05, "trainer": TRAINER, "out": out}
    return Study(Learner, Rows, **(given | settings))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyRecord]:
    made = study(tmp_path_factory.mktemp("studies") / "done")
    spent = torch.ones(200_000_000)  # 800 MB that are none of the runs'
    del spent
    return made, made.run()


def test_a_study_chooses_rates_and_judges_fresh_seeds(done: tuple[Study, StudyRecord]) -> None:
    _, record = done
    assert {cell.state for cell in record.cells} == {"done"}
    assert [len(found) for found in {cell.rows_hash for cell in record.cells}] == [64]
    assert {(cell.seed, cell.phase) for cell in record.cells if cell.arm == "full"} == {
        *((0, "selection"), (1, "verdict"), (2, "verdict"), (3, "verdict"))
    }
    (verdict,) = record.verdicts
    assert (verdict["arm"], verdict["baseline"], verdict["seeds"]) == ("rank 8", "full", 3)
    assert verdict["verdict"] == "matches"
    full, adapted = record.arms
    assert full.chosen_rate is not None
    assert "are worse" in full.why or "flat" in full.why
    assert {cell.learning_rate for cell in record.cells_of("rank 8", "verdict")} == {adapted.chosen_rate}


def test_every_number_of_a_verdict_comes_from_the_row_losses_on_disk(done: tuple[Study, StudyRecord]) -> None:
    _, record = done
    means = {}
    for cell in record.cells:
        losses = record.row_losses(cell)
        assert losses is not None
        assert cell.loss == losses.mean(cell.phase)
        means[cell.arm, cell.seed, cell.phase] = losses.mean("verdict")
    gaps = [means["rank 8", seed, "verdict"] - means["full", seed, "verdict"] for seed in (1, 2, 3)]
    assert record.verdicts[0]["difference"] == pytest.approx(sum(gaps) / 3, rel=1e-9)
    base = record.base_loss("verdict")
    assert base is not None
    assert base == means[UNTRAINED, 0, "base"] > max(means["full", seed, "verdict"] for seed in (1, 2, 3))


def test_the_costs_of_a_run_are_recorded(done: tuple[Study, StudyRecord]) -> None:
    _, record = done
    for cell in record.cells_of("rank 8", "verdict"):
        assert (cell.steps, cell.tokens, cell.trained_parameters) == (72, 3 * 192, 2 * 8 * 12)
        assert cell.seconds is not None
        assert cell.peak_bytes is not None
        assert cell.seconds > 0
        assert cell.peak_bytes > 2**20
        curve = record.curve(cell)
        assert [point.step for point in curve if point.train_loss is not None] == [*range(1, 73)]
        assert [point.step for point in curve if point.val_loss is not None] == [24, 48, 72]
        assert all(a.seconds <= b.seconds and a.tokens <= b.tokens for a, b in itertools.pairwise(curve))
        assert not (record.run_folder(cell) / "checkpoints").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets an earlier peak")
def test_the_peak_of_a_run_is_not_that_of_what_the_process_did_before(done: tuple[Study, StudyRecord]) -> None:
    now = resident_bytes()
    assert now is not None
    assert all(cell.peak_bytes is not None and cell.peak_bytes < now + 700e6 for cell in done[1].cells)


def test_a_finished_study_runs_nothing_again(done: tuple[Study, StudyRecord]) -> None:
    made, record = done
    before = (made.folder / "results.csv").read_bytes()
    assert made.run().verdicts == record.verdicts
    assert (made.folder / "results.csv").read_bytes() == before


def test_another_study_in_the_same_folder_is_refused(done: tuple[Study, StudyRecord]) -> None:
    made, _ = done
    with pytest.raises(ConfigError, match="its band differ"):
        study(made.folder, band=0.01).run()
    with pytest.raises(ConfigError, match="arm 'rank 8'"):
        study(made.folder, arms=ARMS | {"rank 8": {"lora": ll.LoRAConfig(rank=4)}}).run()


def test_arms_see_the_rows_in_the_same_order(tmp_path: Path) -> None:
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    class Watched(Learner):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            seen[self.lora is not None].append(batch[0].clone())
            torch.rand(3 if self.lora else 1)  # as dropout of one arm would
            return super().training_step(batch, batch_idx)

    made = Study(Watched, Rows, ARMS, {"full": [0.06], "rank 8": [0.0014]}, out=tmp_path / "s", trainer=TRAINER)

    for name in ARMS:
        folder = tmp_path / name
        folder.mkdir()
        made._run_cell(Cell(name, 1e-3, 5, "selection", "0" * 16), folder, Event())
    assert len(seen[False]) == len(seen[True]) == 72
    assert all(torch.equal(one, other) for one, other in zip(seen[False], seen[True], strict=True))
    assert not torch.equal(seen[False][0], seen[False][24])


def test_a_run_that_diverges_or_breaks_is_a_row_with_its_reason(tmp_path: Path) -> None:
    class Broken(Learner):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            if self.lora is not None:
                raise RuntimeError("no kernel for this rank")
            return super().training_step(batch, batch_idx) * (math.inf if self.learning_rate > 0.1 else 1)

    record = Study(Broken, Rows, ARMS, RATES, seeds=1, out=tmp_path / "s", trainer=TRAINER | {"max_epochs": 1}).run()
    reasons = {(cell.arm, cell.learning_rate): cell.reason for cell in record.cells if cell.state == "failed"}
    assert reasons["full", 0.12].startswith("diverged: the gradient of")
    assert reasons["rank 8", 0.0007] == "RuntimeError: no kernel for this rank"
    assert [cell.attempt for cell in record.cells_of("rank 8")] == [2, 2, 2]
    assert "every run failed: RuntimeError: no kernel" in record.verdicts[0]["sentence"]
    again = Study(Broken, Rows, ARMS, RATES, seeds=1, out=tmp_path / "s", trainer=TRAINER | {"max_epochs": 1})
    assert {cell.attempt for cell in again.run().cells_of("rank 8")} == {2}, "failed runs stay"
    assert {cell.attempt for cell in again.run(retry_failed=True).cells_of("rank 8")} == {4}


def test_a_folder_that_is_no_study_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no study folder"):
        read_study(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no study folder; choose another one"):
        study(tmp_path).run()
    assert json.dumps([file.name for file in tmp_path.iterdir()]) == '["notes.txt"]'


UNEQUAL: dict[str, tuple[dict[str, Any], str]] = {
    "precision": (
        {"trainer": {"precision": "bf16-true"}},
        "differ in precision .trainer.precision: None and 'bf16-true",
    ),
    "epochs": ({"trainer": {"max_epochs": 5}}, "differ in number of epochs"),
    "data": ({"data": {"rows": 3}}, r"differ in data .data\.init_args\.rows: None and 3"),
    "nothing": ({}, "'full' and 'other' are the same"),
    "an argument": ({"rank": 8}, "arm 'other': Learner takes no 'rank'"),
    "an argument of the data": ({"data": {"batchsize": 8}}, "Sized takes no 'batchsize'; did you mean 'batch_size'"),
    "an option of the Trainer": (
        {"trainer": {"max_epoch": 1}},
        "Trainer takes no 'max_epoch'; did you mean 'max_epochs'",
    ),
    "devices": (
        {"trainer": {"devices": 2}},
        r"arm 'other': trainer\.devices is 2, and each run of a study trains on one device",
    ),
}


class Sized(Rows):
    def __init__(self, batch_size: int = 8, rows: int = 192) -> None:
        super().__init__(batch_size)


@pytest.mark.parametrize(("arm", "message"), UNEQUAL.values(), ids=list(UNEQUAL))
def test_a_mistake_in_an_arm_is_one_error_before_anything_is_written(
    tmp_path: Path, arm: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(Learner, Sized, {"full": {}, "other": arm}, 0.01, out=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_arms_may_differ_in_batch_size(tmp_path: Path) -> None:
    arms = {"full": {}, "other": {"data": {"batch_size": 16}}}
    Study(Learner, Sized, arms, 0.01, out=tmp_path / "s")
    with pytest.raises(ConfigError, match="learning_rates is empty"):
        Study(Learner, Sized, arms, [], out=tmp_path / "s")
    with pytest.raises(ConfigError, match="learning_rates has no rate for the arm 'other'"):
        Study(Learner, Sized, arms, {"full": 0.1}, out=tmp_path / "s")


def test_a_database_of_another_study_is_refused(tmp_path: Path, done: tuple[Study, StudyRecord]) -> None:
    made, _ = done
    storage = f"sqlite:///{made.folder / 'study.sqlite'}"
    with pytest.raises(ConfigError, match="holds the study 'done', and this one is 'other'"):
        study(tmp_path / "other", storage=storage).run()
    assert not (tmp_path / "other" / "study.yaml").exists()
    with pytest.raises(ConfigError, match="cannot be opened"):
        study(tmp_path / "other", storage="sqlite:////proc/none/study.sqlite").run()


def test_two_studies_in_one_folder_are_refused(tmp_path: Path, done: tuple[Study, StudyRecord]) -> None:
    made, _ = done
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.yaml").write_bytes((made.folder / "study.yaml").read_bytes())
    before = toys.tree(tmp_path)
    with pytest.raises(ConfigError, match="mine holds the study 'done', and this one is 'mine': choose another --out"):
        study(tmp_path / "mine").run()
    assert toys.tree(tmp_path) == before
