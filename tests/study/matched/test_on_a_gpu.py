"""A study on a GPU: memory and energy are those of the device, and arms side by side lose nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_lora as ll
from tests.study.bank.test_in_a_study import ARMS, RATES
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def rows(folder: Path, **settings: Any) -> list[dict[str, str]]:
    trainer = {"accelerator": "gpu", "devices": 1, "max_epochs": 1}
    ll.Study(Learner, Rows, ARMS, RATES, seeds=2, out=folder, trainer=trainer, **settings).run()
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_memory_and_energy_of_a_run_are_those_of_the_gpu_cuda(tmp_path: Path) -> None:
    found = [row for row in rows(tmp_path) if row["phase"] != "base"]
    assert {row["state"] for row in found} == {"done"}
    # The learner has some thousand weights; a Python process alone has hundreds of MB.
    assert all(0 < int(row["peak_bytes"]) < 100e6 for row in found)
    assert sum(float(row["energy_joules"]) for row in found) > 0


@pytest.mark.parametrize("mode", ["turns", "rows"])
def test_arms_side_by_side_on_a_gpu_have_the_losses_of_separate_runs_cuda(tmp_path: Path, mode: str) -> None:
    apart = {row["run"].rpartition("-")[0]: float(row["loss"]) for row in rows(tmp_path / "apart")}
    together = rows(tmp_path / "together", arms_per_device=2, arms_mode=mode)
    assert {row["state"] for row in together} == {"done"}
    for row in together:
        assert float(row["loss"]) == pytest.approx(apart[row["run"].rpartition("-")[0]], rel=1e-4)
