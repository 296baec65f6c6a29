from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lightning_lora.cli.study import processes
from lightning_lora.cli.study.arms import resolve
from lightning_lora.study.bank.groups import Job
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.spec import read_spec
from tests.cli.study.test_study_command import ARMS, write


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the forked processes are no tests
def test_runs_in_one_process_end_as_those_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "START", "fork")
    more: dict[str, Any] = {"overrides": {"model.init_args.lora": {"rank": 2}}, "learning_rates": [1e-4, 3e-4]}
    file = write(tmp_path, arms=ARMS | {"rank 2": more}, arms_per_device=2)
    spec = resolve(*read_spec(file), tmp_path)
    cells = processes.ProcessCells(spec)
    group = cells.side_by_side()
    assert group is not None
    assert group.announcement()[0] == "apart, not side by side: full: it trains the base"
    jobs: list[Job] = []
    for place in ("together", "apart"):
        for arm, seed in (("rank 8", 1), ("rank 2", 2)):
            cell = Cell(arm, 3e-4, seed, "verdict", "0" * 16)
            folder = tmp_path / place / cell.run
            folder.mkdir(parents=True)
            jobs.append((cell, folder, Event()))
    results, remarks = group.run(jobs[:2])
    assert not remarks
    for job, found in zip(jobs[2:], results, strict=True):
        assert isinstance(found, Outcome), found
        alone = cells(*job)
        assert found.rows.loss_sum.tolist() == alone.rows.loss_sum.tolist()
        assert (found.steps, found.tokens, found.saved_bytes) == (alone.steps, alone.tokens, alone.saved_bytes)
        assert found.peak_bytes is None
    for name in ("adapters/last/adapter_model.safetensors", "curve.csv", "row_losses.safetensors", "log.txt"):
        assert all((folder / name).is_file() for _, folder, _ in jobs[:2]), name
    adapters = [folder / "adapters/last/adapter_model.safetensors" for _, folder, _ in jobs]
    assert adapters[0].read_bytes() == adapters[2].read_bytes()
    assert adapters[1].read_bytes() == adapters[3].read_bytes()
