"""The measuring run for a GPU, dry on a CPU: every part runs, and what it calls correct is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.on_gpu import PARTS
from tests.support import warm


@pytest.mark.slow
def test_every_part_runs_dry_and_fused_arithmetic_is_right(tmp_path: Path) -> None:
    warm.run_ranks(1, "-m", "benchmarks.on_gpu", "--dry", "--seconds", "300", "--out", tmp_path, cwd=warm.ROOT)
    summary = (tmp_path / "summary.md").read_text()
    assert not [line for line in summary.splitlines() if "failed" in line or "- where" in line]
    titles = [line.split(":")[0] for line in summary.splitlines() if line.startswith("## ")]
    assert titles == [f"## {part}" for part in PARTS]
    with tarfile.open(tmp_path / "results.tgz") as archive:
        file = archive.extractfile("correctness.json")
        assert file is not None
        assert json.load(file)["all ok"] is True


def test_a_run_without_a_place_for_its_results_is_refused() -> None:
    done = warm.run("-m", "benchmarks.on_gpu", "--dry", cwd=warm.ROOT)
    assert done.returncode == 2
    assert "--out is needed: the folder for the results" in done.stderr
