from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest

import lightning_lora as ll
from tests.study.matched.learner import Learner, Rows
from tests.support import toys, warm

pytestmark = [*toys.expected_warnings, pytest.mark.slow]
ARMS: dict[str, Any] = {"full": {"lora": None}, **{f"rank {r}": {"lora": ll.LoRAConfig(rank=r)} for r in (2, 8)}}
RATES = {"full": [0.06, 0.12], "rank 2": [0.0014, 0.0028], "rank 8": [0.0014, 0.0028]}


def losses(folder: Path, **settings: Any) -> dict[str, str]:
    trainer = {"accelerator": "cpu", "max_epochs": 1}
    ll.Study(Learner, Rows, ARMS, RATES, seeds=2, out=folder, trainer=trainer, **settings).run()
    with (folder / "results.csv").open(newline="") as file:
        return {row["run"]: row["loss"] for row in csv.DictReader(file)}


def test_arms_of_a_study_side_by_side_have_the_losses_of_separate_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = losses(tmp_path / "study")
    (tmp_path / "study").rename(tmp_path / "apart")
    together = losses(tmp_path / "study", arms_per_device=2)
    assert together == apart
    assert "apart, not side by side: full: it trains the base" in capsys.readouterr().out


KILLED = """
import sys, time
import lightning_lora as ll
from tests.study.bank.test_in_a_study import ARMS, RATES
from tests.study.matched.learner import Learner, Rows

class Slow(Learner):
    def training_step(self, batch, batch_idx):
        time.sleep(0.004)
        return super().training_step(batch, batch_idx)

trainer = {"accelerator": "cpu", "max_epochs": 1}
options = {"arms_per_device": 2, "checkpoint_minutes": 1e-3}
ll.Study(Slow, Rows, ARMS, RATES, seeds=2, out="study", trainer=trainer, **options).run()
"""


def test_a_study_with_arms_side_by_side_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    process = warm.Process(tmp_path / "killed.py", cwd=tmp_path)
    while len(list((tmp_path / "study" / "runs").glob("rank*/checkpoints/*.ckpt"))) < 2:
        assert process.poll() is None, "both arms of a group are in the middle of their runs"
        time.sleep(0.02)
    process.kill_all()
    done = warm.run(tmp_path / "killed.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "study" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"done"}
    expected = losses(tmp_path / "whole")
    assert {row["run"].rpartition("-")[0]: row["loss"] for row in rows} == {
        run.rpartition("-")[0]: loss for run, loss in expected.items()
    }
