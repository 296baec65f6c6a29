from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from lightning_lora import Study
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.folder import write_study
from lightning_lora.study.matched.record import read_study
from lightning_lora.study.matched.store import Store
from lightning_lora.study.matched.worker import RunError, Worker
from tests.study.matched import planted
from tests.study.matched.learner import Learner, Rows
from tests.study.matched.planted import BASE_LOSS, finished, planted_loss, spec
from tests.support import toys

pytestmark = toys.expected_warnings
WIDE = (1e-5, 3e-5, 9e-5, 2.7e-4, 8.1e-4)


def study(**settings: Any) -> Any:
    made = spec(halving=True, **settings)
    return replace(made, arms=tuple(replace(arm, learning_rates=WIDE) for arm in made.arms))


def test_rates_far_behind_after_a_third_of_the_run_are_given_up() -> None:
    plan, known = finished(study(), planted_loss)
    given_up = {run.cell.learning_rate for run in known.values() if run.cell.key in plan.pruned}
    assert given_up == {1e-5, 3e-5}, "rates beside the best stay, and so do close ones"
    selected = {run.cell.learning_rate for run in known.values() if run.cell.phase == "selection"}
    assert not given_up & selected
    assert {*WIDE} - given_up <= selected
    assert {run.cell.phase for run in known.values() if run.cell.key in plan.pruned} == {"rung"}
    assert set(plan.pruned.values()) == {
        "given up after a third of its steps: more than 5 bands (0.025 nats) worse than learning rate 0.00027"
    }
    without, _ = finished(replace(study(), halving=False), planted_loss)
    assert {name: step.chosen for name, step in plan.choices.items()} == {
        name: step.chosen for name, step in without.choices.items()
    }
    assert [verdict.sentence for verdict in plan.verdicts] == [verdict.sentence for verdict in without.verdicts]
    assert plan.expected == len(plan.cells) == len(known)


def test_a_run_that_is_given_up_beside_the_best_is_worse_and_no_number() -> None:
    """What is best after a third may be beside it in the end: then no parabola uses the loss that is not known."""

    def loss(cell: Cell) -> float:
        if cell.phase == "rung":
            return {9e-5: 1.5, 2.7e-4: 1.9, 8.1e-4: 1.5, 3e-5: 1.2}.get(cell.learning_rate, 1.9)
        if cell.phase == "selection":
            return {3e-5: 2.0, 9e-5: 1.4}.get(cell.learning_rate, 2.5)
        return BASE_LOSS if cell.phase == "base" else 1.4

    plan, _ = finished(study(), loss)
    assert plan.choices["full"].chosen == 9e-5
    assert plan.choices["full"].why == "9e-05 is the best of 5 rates; one beside it was given up early"
    assert plan.choices["full"].expected_best == ()


def test_a_first_third_that_fails_or_diverges_is_not_gone_on_with() -> None:
    def loss(cell: Cell) -> float | str:
        if cell.phase == "rung" and cell.arm == "rank 1":
            return "no memory"
        return "diverged: NaN" if cell.learning_rate > 5e-4 else planted_loss(cell)

    plan, known = finished(study(), loss)
    assert "every run failed: no memory" in plan.verdicts[1].sentence
    assert max(run.cell.learning_rate for run in known.values() if run.cell.phase == "selection") < 5e-4
    assert plan.verdicts[0].verdict == "matches"


def test_runs_that_all_fail_after_their_first_third_end_the_sweep() -> None:
    plan, known = finished(
        study(), lambda cell: "no disk" if (cell.arm, cell.phase) == ("rank 1", "selection") else planted_loss(cell)
    )
    assert "every run failed: no disk" in plan.verdicts[1].sentence
    assert {run.cell.learning_rate for run in known.values() if run.cell.arm == "rank 1"} == {*WIDE}


def test_what_was_given_up_is_a_state_with_a_reason_in_the_folder(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'study.sqlite'}", "planted", 120)
    store.open({"fixed": {}, "arms": {}})

    def run(cell: Cell, folder: Path, lost: Event) -> Outcome:
        (folder / "checkpoints").mkdir(exist_ok=True)
        return planted.outcome(planted_loss(cell))

    write_study(tmp_path, study(), {})
    Worker(study(), planted.DATA, tmp_path, store, run, lambda line: None).work()
    record = read_study(tmp_path)
    pruned = [cell for cell in record.cells if cell.state == "pruned"]
    assert {cell.learning_rate for cell in pruned} == {1e-5, 3e-5}
    assert all(cell.loss is None and "given up after a third" in cell.reason for cell in pruned)
    assert not any((record.run_folder(cell) / "checkpoints").exists() for cell in pruned)
    going_on = next(cell for cell in record.cells if cell.phase == "rung" and cell.state == "done")
    assert (record.run_folder(going_on) / "checkpoints").exists()
    assert record.row_losses(going_on) is None


def run_of(folder: Path, phases: tuple[Any, ...], **trainer: Any) -> list[Outcome]:
    options = {"accelerator": "cpu", "max_epochs": 2} | trainer
    made = Study(Learner, Rows, {"a": {"lora": None}, "b": {}}, 0.01, out=folder / "study", trainer=options)
    (folder / "run").mkdir(parents=True)
    return [made._run_cell(Cell("a", 1e-2, 5, phase, "0" * 16), folder / "run", Event()) for phase in phases]


def test_a_run_that_pauses_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    (whole,) = run_of(tmp_path / "whole", ("selection",))
    rung, rest = run_of(tmp_path / "paused", ("rung", "selection"))
    assert (rung.steps, rest.steps, whole.steps) == (16, 48, 48)
    assert rung.tokens == 16 * 8
    assert rest.tokens == whole.tokens
    assert torch.equal(rest.rows.loss_sum, whole.rows.loss_sum)
    assert not torch.equal(rung.rows.loss_sum, whole.rows.loss_sum)
    assert rest.evaluations == whole.evaluations
    assert not (tmp_path / "paused" / "run" / "checkpoints").exists()


def test_a_rung_that_was_killed_at_its_end_has_the_same_place_in_the_schedule(tmp_path: Path) -> None:
    first, again, rest = run_of(tmp_path, ("rung", "rung", "selection"))
    assert (first.steps, again.steps, rest.steps) == (16, 16, 48)
    assert torch.equal(first.rows.loss_sum, again.rows.loss_sum)


def test_halving_without_a_known_number_of_steps_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"halving needs runs with a known number of steps: set trainer\.max_steps"):
        run_of(tmp_path, ("rung",), max_epochs=-1, max_time="00:00:00:02")


@pytest.mark.slow
def test_a_study_with_all_options_ends_and_has_a_report(tmp_path: Path) -> None:
    made = Study(
        Learner,
        Rows,
        {"full": {"lora": None}, "clipped": {"trainer": {"gradient_clip_val": 50.0}}},
        [0.001, 0.03, 0.06, 0.12],
        evaluations=1.5,
        aa=True,
        halving=True,
        trainer={"accelerator": "cpu", "max_epochs": 3},
        out=tmp_path / "study",
    )
    record = made.run()
    assert {cell.state for cell in record.cells} == {"done", "pruned"}
    assert {cell.learning_rate for cell in record.cells if cell.state == "pruned"} == {0.001, 0.03}
    assert [arm.chosen_rate for arm in record.arms] == [0.06, 0.06]
    assert record.verdicts[0]["verdict"] == "matches"
    steps = record.verdicts[0]["steps_to_loss"]
    assert (steps["ratio"], steps["seeds"], steps["left_out"]) == (pytest.approx(1.0), 3, "")
    assert record.noise_floor is not None
    assert "unfinished" not in made.report().read_text()


def test_no_run_is_given_up_by_default() -> None:
    _, known = finished(replace(study(), halving=False), planted_loss)
    assert {run.cell.phase for run in known.values()} == {"base", "selection", "verdict"}
