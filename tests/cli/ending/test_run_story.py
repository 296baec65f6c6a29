"""A run says how it started and ended, keeps what its losses took, and leaves a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.callbacks import AdapterCheckpoint
from lightning_lora.cli.ending import end_of_run
from lightning_lora.cli.ending.end_of_run import EndOfRun
from lightning_lora.files.events import read_events
from lightning_lora.study.report.runs.losses import LossCurve, read_losses
from lightning_lora.study.report.runs.run_record import read_run
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


class At(Callback):
    """Does something at a step."""

    def __init__(self, step: int, action: Callable[[Trainer], object]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def fail(error: BaseException) -> Callable[[Trainer], None]:
    def action(trainer: Trainer) -> None:
        raise error

    return action


def fit(folder: Path, *callbacks: Callback, **options: Any) -> None:
    runner = toys.trainer(folder, callbacks=[AdapterCheckpoint(), *callbacks, EndOfRun()], **options)
    runner.fit(Toy(), toys.loader(), toys.loader(2))


@pytest.mark.parametrize(
    ("error", "how", "reason"),
    [
        (None, "done", None),
        (SIGTERMException(), "stopped", None),
        (RuntimeError("out of <memory>\nsecond line"), "failed", "RuntimeError: out of <memory>"),
    ],
)
def test_a_run_says_how_it_started_and_ended(
    error: BaseException | None, how: str, reason: str | None, tmp_path: Path
) -> None:
    if error is None:
        fit(tmp_path)
    elif isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            fit(tmp_path, At(3, fail(error)))
    else:
        with pytest.raises(SIGTERMException):
            fit(tmp_path, At(3, fail(error)))
    start, end = read_events(tmp_path)
    assert (start["event"], start["step"], start["steps_planned"]) == ("started", 0, 4)
    assert start["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert start["trained_parameters"] == 2 * (4 + 8) + 2 * (8 + 2)
    assert (end["event"], end["how"], end.get("reason")) == ("ended", how, reason)
    assert end["step"] == (4 if error is None else 3)
    run = read_run(tmp_path)
    assert run.ending == how
    page = (tmp_path / "report.html").read_text()
    assert "<memory>" not in page
    assert (reason is None) or "out of &lt;memory&gt;" in page


def test_validation_takes_no_time_of_training(tmp_path: Path) -> None:
    class Slow(Callback):
        def on_validation_batch_end(self, *arguments: Any, **options: Any) -> None:
            time.sleep(0.2)

    fit(tmp_path, Slow(), max_epochs=2, num_sanity_val_steps=0)
    losses = read_losses(tmp_path)
    assert list(losses.validation) == [4, 8]
    assert [tokens for tokens, _ in losses.effort.values()] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert losses.effort[8][1] - losses.effort[4][1] < 0.2


def test_losses_are_on_disk_while_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[int]] = {}

    def look(trainer: Trainer) -> None:
        seen[trainer.global_step] = list(read_losses(tmp_path).train)

    fit(
        tmp_path / "slow",
        At(6, lambda trainer: seen.setdefault(0, list(read_losses(tmp_path / "slow").train))),
        max_epochs=2,
    )
    assert seen[0] == [1, 2, 3, 4], "up to the last validation"
    monkeypatch.setattr(end_of_run, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(end_of_run, "_RESTS", 0)
    fit(tmp_path, At(3, look))
    assert seen[3] == [1, 2]


def test_a_run_that_leaves_nothing_writes_nothing(tmp_path: Path) -> None:
    runner = toys.trainer(tmp_path, callbacks=[EndOfRun()])
    runner.fit(Toy(), toys.loader(), toys.loader(2))
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(end_of_run, "_write_report", full)
    with pytest.warns(UserWarning, match=r"report.html is not made: OSError: No space left"):
        fit(tmp_path)
    assert read_run(tmp_path).ending == "done"


def test_a_full_disk_costs_the_files_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(LossCurve, "write", full)
    monkeypatch.setattr(end_of_run, "tell_start", full)
    with pytest.warns(UserWarning, match="Nothing else of the run is affected") as caught:
        fit(tmp_path, max_epochs=3)
    told = [str(warning.message).partition(" ")[0] for warning in caught if "is not made" in str(warning.message)]
    assert sorted(told) == ["curve.csv", "events.jsonl"], "each is told once"
    assert (tmp_path / "adapters/last").is_dir()
