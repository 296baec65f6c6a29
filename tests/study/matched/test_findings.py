"""What a planted study finds beside its verdicts: steps, since when, the noise floor, the price of a large batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.study.matched.cells import Cell, CellStatus
from lightning_lora.study.matched.folder import write_results, write_study
from lightning_lora.study.matched.planner import StudyPlan, plan_study
from lightning_lora.study.matched.record import read_study
from lightning_lora.study.matched.spec import StudySpec
from tests.study.matched.planted import BASE_LOSS, DATA, finished, planted_loss, spec

FOUR = ("full, small", "lora, small", "full, large", "lora, large")
PENALTY = {"lora": {"small": FOUR[1], "large": FOUR[3]}, "full": {"small": FOUR[0], "large": FOUR[2]}}


def evaluated(study: StudySpec, of: Callable[[Cell], Any], **changes: Any) -> StudyPlan:
    """The plan of a finished study whose runs have the evaluations that ``of`` gives."""
    _, known = finished(study, lambda cell: planted_loss(cell, behind=0.05))

    def with_curve(run: CellStatus) -> CellStatus:
        assert run.outcome is not None
        return replace(run, outcome=replace(run.outcome, evaluations=tuple(of(run.cell)), **changes))

    return plan_study(study, map(with_curve, known.values()), DATA)


def halves(cell: Cell) -> list[tuple[int, int, float]]:
    """The excess over 2 nats halves each 10 steps, for rank 1 each 20; seeds differ in tokens, as those of rows do."""
    if cell.phase == "base":
        return [(0, 0, BASE_LOSS)]
    life = 20 if cell.arm == "rank 1" else 10
    return [(step, step * (100 + cell.seed), 2 + 0.5 ** (step / life)) for step in range(5, 61, 5)]


def test_a_verdict_tells_steps_to_the_loss_of_the_selection_runs() -> None:
    plan = evaluated(spec(), halves)
    matches, behind = plan.verdicts
    assert matches.steps is not None
    assert behind.steps is not None
    assert behind.steps.target == pytest.approx(BASE_LOSS - 0.9 * (1 - 0.5**6))
    assert str(matches.steps) == "1.0000 (1.0000 to 1.0000)"
    assert behind.steps.to_dict()["text"] == ">= 1.910, not reached in 3 of 3"  # 60 / 31.41
    assert behind.to_dict()["steps_to_loss"]["reached"]["arm"] == {str(seed): [60.0, "at least"] for seed in (1, 2, 3)}
    assert behind.to_dict()["steps_to_loss"]["high"] is None


def test_a_verdict_says_since_when_an_arm_is_behind() -> None:
    plan = evaluated(spec(), halves)
    assert plan.verdicts[0].after_tokens is None
    assert plan.verdicts[1].after_tokens == 5 * 102
    assert plan.verdicts[1].sentence.endswith(") after 510 tokens")


@pytest.mark.parametrize(
    ("of", "changes", "why"),
    [
        (halves, {"rate_fell": True}, "the learning rate falls during the runs"),
        (lambda cell: halves(cell)[:1], {}, "fewer than two evaluations"),
        (lambda cell: [], {}, "selection runs of the baseline have no evaluations"),
    ],
    ids=["decay", "one evaluation", "none"],
)
def test_steps_are_left_out_with_the_reason(of: Any, changes: dict[str, Any], why: str) -> None:
    plan = evaluated(spec(), of, **changes)
    for verdict in plan.verdicts:
        found = verdict.to_dict()["steps_to_loss"]
        assert found["ratio"] is None
        assert why in found["left_out"]
        assert found["text"] == f"left out: {found['left_out']}"


def test_evaluations_at_other_tokens_are_not_compared() -> None:
    def shifted(cell: Cell) -> Any:
        return [(step, tokens + (cell.arm == "rank 1"), loss) for step, tokens, loss in halves(cell)]

    assert evaluated(spec(), shifted).verdicts[1].after_tokens is None


def test_the_worst_seed_stands_beside_each_verdict() -> None:
    def loss(cell: Cell) -> float:
        return planted_loss(cell) + (0.3 if (cell.arm, cell.seed) == ("rank 1", 2) else 0)

    plan, _ = finished(spec(), loss)
    verdict = plan.verdicts[1].to_dict()
    assert verdict["worst"]["seed"] == 2
    assert verdict["worst"]["loss"] == pytest.approx(2.3, abs=0.02)
    assert verdict["baseline_worst"]["loss"] == pytest.approx(2.0, abs=0.02)


def test_the_expected_best_of_a_smaller_budget_is_told() -> None:
    plan, known = finished(spec(), planted_loss)
    tried = [run.loss or 0 for run in known.values() if (run.cell.arm, run.cell.phase) == ("full", "selection")]
    found = plan.choices["full"].expected_best
    assert len(found) == len(tried)
    assert found[0] == pytest.approx(sum(tried) / len(tried))
    assert found[-1] == pytest.approx(min(tried))
    assert list(found) == sorted(found, reverse=True)


def test_the_baseline_against_itself_is_the_noise_floor() -> None:
    plan, known = finished(spec(aa=True), planted_loss)
    again = [run.cell for run in known.values() if run.cell.phase == "aa"]
    assert {(cell.arm, cell.seed) for cell in again} == {("full", 4), ("full", 5), ("full", 6)}
    assert {cell.learning_rate for cell in again} == {plan.choices["full"].chosen}
    assert plan.expected == len(plan.cells) == len(known)
    floor = plan.further.noise_floor
    assert floor is not None
    assert floor.sentence.startswith("full with other seeds matches full within 0.005 nats")
    assert plan.further.spread == pytest.approx(0.0005, rel=0.7)
    assert len(plan.verdicts) == 2
    waiting = plan_study(spec(aa=True), [run for run in known.values() if run.cell.seed != 6], DATA)
    assert waiting.further.noise_floor is None
    assert waiting.verdicts == plan.verdicts


def test_the_noise_floor_uses_seeds_that_no_other_run_has() -> None:
    assert spec(aa=True, seeds="auto").aa_seeds == (9, 10, 11)
    assert spec(aa=True, seeds=(7, 3, 5), selection_seeds=(20,)).aa_seeds == (21, 22, 23)
    assert spec().aa_seeds == ()


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (0.03, "nats more than full fine-tuning (0.0"),
        (0.0, "the large batch costs LoRA as much as full fine-tuning within 0.005 nats"),
        (-0.03, "nats less than full fine-tuning (0.0"),
    ],
)
def test_a_large_batch_is_judged_by_a_difference_of_differences(cost: float, words: str) -> None:
    def loss(cell: Cell) -> float:
        everywhere = 0.1 * cell.arm.endswith("large") + 0.02 * cell.arm.startswith("lora")
        return planted_loss(cell) + everywhere + cost * (cell.arm == FOUR[3])

    plan, _ = finished(spec(FOUR, batch_penalty=PENALTY), loss)
    assert words in plan.further.to_dict()["batch_penalty"]["sentence"]
    assert plan.further.to_dict()["batch_penalty"]["difference"] == pytest.approx(cost, abs=0.003)


def test_a_batch_penalty_that_is_open_gets_the_next_seeds_of_all_four_arms() -> None:
    def loss(cell: Cell) -> float:
        noisy = cell.phase == "verdict" and cell.arm == FOUR[3]
        return planted_loss(cell) + (0.3 * cell.arm.endswith("large")) + (0.004 * (-1) ** cell.seed if noisy else 0)

    study = spec(FOUR, batch_penalty=PENALTY, seeds="auto")
    plan, known = finished(study, loss)
    seeds = {
        arm: {run.cell.seed for run in known.values() if run.cell.arm == arm and run.cell.phase == "verdict"}
        for arm in FOUR
    }
    assert set(map(len, seeds.values())) == {8}
    assert [verdict.seeds for verdict in plan.verdicts] == [3, 3, 3]
    penalty = plan.further.batch_penalty
    assert penalty is not None
    assert penalty.seeds == 8


def test_an_arm_of_four_whose_sweep_fails_leaves_the_batch_penalty_open_with_its_reason() -> None:
    plan, _ = finished(
        spec(FOUR, batch_penalty=PENALTY), lambda cell: "no memory" if cell.arm == FOUR[3] else planted_loss(cell)
    )
    penalty = plan.further.to_dict()["batch_penalty"]
    assert penalty["verdict"] == "cannot tell"
    assert "every run failed: no memory (lora, large)" in penalty["sentence"]


def test_all_of_it_is_in_the_folder_and_read_back(tmp_path: Path) -> None:
    study = spec(FOUR, batch_penalty=PENALTY, aa=True, evaluations=1.1)
    plan = evaluated(study, halves)
    statuses = [CellStatus(cell, "ready") for cell in plan.cells]
    write_study(tmp_path, study, {})
    write_results(tmp_path, statuses, plan.choices, plan.verdicts, plan.further)
    record = read_study(tmp_path)
    assert record.noise_floor is not None
    assert record.noise_floor["run_spread"] == plan.further.spread
    assert record.batch_penalty == json.loads((tmp_path / "further.json").read_text())["batch_penalty"]
    assert record.arms[0].expected_best == plan.choices[FOUR[0]].expected_best
    assert record.verdicts[0]["steps_to_loss"]["seeds"] == 3
    assert record.spec["batch_penalty"] == PENALTY
    assert {cell.energy_joules for cell in record.cells} == {None}
