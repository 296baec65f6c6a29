from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import lightning_lora as ll
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

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
