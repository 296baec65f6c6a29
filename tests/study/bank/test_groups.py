"""What a worker does side by side: which runs it claims together, and what becomes of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.study.bank.exactness import ApartError
from lightning_lora.study.bank.groups import Job, SideBySide
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.record import read_results
from lightning_lora.study.matched.spec import spec_of
from lightning_lora.study.matched.store import Store
from lightning_lora.study.matched.worker import LeaseLostError, RunError, Worker
from tests.study.matched import planted

Result = Outcome | BaseException


def scored(cell: Cell) -> Outcome:
    return planted.outcome(planted.planted_loss(cell))


class Study:
    """A worker of a planted study that notes which runs it does together, and which alone."""

    def __init__(self, folder: Path, result_of: Callable[[Cell], Result] = scored, most: int = 3) -> None:
        self.groups: list[list[Cell]] = []
        self.alone: list[Cell] = []
        self.lines: list[str] = []
        self.result_of = result_of
        self.store = Store(f"sqlite:///{folder / 'study.sqlite'}", "planted")
        self.store.open({"fixed": {}, "arms": {}})
        group = SideBySide(most, {"full": "it trains the base"}, self.run_group)
        self.worker = Worker(
            planted.spec(), planted.DATA, folder, self.store, self.run, self.lines.append, side_by_side=group
        )

    def run(self, cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        self.alone.append(cell)
        return scored(cell)

    def run_group(self, jobs: Sequence[Job]) -> tuple[list[Result], list[str]]:
        self.groups.append([cell for cell, _, _ in jobs])
        return [self.result_of(cell) for cell, _, _ in jobs], []


def test_adapter_runs_are_claimed_together_and_full_ones_alone(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.worker.work()
    plan, known = planted.finished(planted.spec(), planted.planted_loss)
    assert {run.cell.key: run.loss for run in study.store.statuses()} == {key: run.loss for key, run in known.items()}
    assert sorted(len(group) for group in study.groups)[-1] == 3
    assert {cell.arm for group in study.groups for cell in group} == {"rank 8", "rank 1"}
    assert {cell.phase for cell in study.alone if cell.arm == "full"} == {"selection", "verdict"}
    done = [cell.key for group in study.groups for cell in group] + [cell.key for cell in study.alone]
    assert len(done) == len(set(done)) == len(plan.cells), "none is done twice"
    assert len(read_results(tmp_path / "results.csv")) == len(plan.cells)


def test_each_run_of_a_group_ends_in_its_own_way(tmp_path: Path) -> None:
    first: list[Cell] = []

    def result(cell: Cell) -> Result:
        first.append(cell)
        trained = tmp_path / "runs" / cell.run / "checkpoints" / "step=1.ckpt"
        trained.parent.mkdir(parents=True)
        trained.touch()
        endings: list[Result] = [
            scored(cell),
            RunError("diverged: the gradient is NaN", is_final=True),
            ApartError("its structure differs"),
        ]
        return endings[len(first) - 1] if len(first) <= 3 else scored(cell)

    study = Study(tmp_path, result)
    study.worker.work()
    states = {run.cell.key: (run.state, run.attempt) for run in study.store.statuses()}
    assert [states[cell.key] for cell in first[:3]] == [("done", 1), ("failed", 1), ("done", 1)]
    assert first[2] in study.alone
    assert not (tmp_path / "runs" / first[2].run / "checkpoints").exists(), "it begins anew"
    assert f"apart, not side by side: {first[2].arm}: its structure differs" in study.lines


def test_a_group_whose_process_dies_goes_on_one_by_one(tmp_path: Path) -> None:
    begun: list[Cell] = []

    def result(cell: Cell) -> Result:
        begun.append(cell)
        return RunError("its process ended with SIGKILL; out of memory?", is_final=False)

    study = Study(tmp_path, result)
    study.worker.work()
    assert begun
    assert {*begun} <= {*study.alone}
    assert {run.state for run in study.store.statuses()} == {"done"}


@pytest.mark.parametrize("stop", [SystemExit(143), LeaseLostError()], ids=["told to stop", "lease lost"])
def test_runs_of_a_group_that_is_stopped_are_given_back(tmp_path: Path, stop: BaseException) -> None:
    study = Study(tmp_path, lambda cell: SystemExit(143) if isinstance(stop, SystemExit) else stop)
    while not study.groups:
        plan, _ = study.worker.plan()
        claim = study.store.claim()
        assert claim is not None
        if isinstance(stop, SystemExit) and study.worker.side_by_side.takes(claim.cell, 1):  # type: ignore[union-attr]
            with pytest.raises(SystemExit):
                study.worker._do([claim, *study.worker._others(claim)], plan)
        else:
            study.worker._do([claim, *study.worker._others(claim)], plan)
    states = {run.state for run in study.store.statuses() if run.cell in study.groups[0]}
    assert states == ({"ready"} if isinstance(stop, SystemExit) else {"running"})


@pytest.mark.parametrize("wrong", [{"arms_per_device": 0}, {"arms_per_device": True}, {"arms_mode": "row"}])
def test_a_wrong_setting_is_one_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        spec_of({"arms": {"full": {}, "rank 8": {}}} | wrong, "study")
