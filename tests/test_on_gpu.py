"""The measuring run for a GPU, dry on a CPU: every part runs, and what it calls correct is."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu.kernel_choice import longest_run
from benchmarks.on_gpu import PARTS
from lightning_lora.lora.functional.kernels import choice
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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_compared_with_torch_and_the_table_is_written(tmp_path: Path) -> None:
    options = ("--dry", "--only", "kernel_choice", "--out", tmp_path, "--work", tmp_path / "work")
    warm.run_cold("-m", "benchmarks.on_gpu", *options, TRITON_INTERPRET="1", LIGHTNING_LORA_KERNELS="off")
    found = json.loads((tmp_path / "work" / "kernel_choice.json").read_text())
    assert {name.split(",")[0] for name in found} == set(choice.KERNELS)
    for case, by_rows in found.items():
        ((ours, torchs),) = (verdict["errors"] for verdict in by_rows.values())
        assert ours <= max(2 * torchs, 1e-6), case
        # What an interpreter does is not what torch does: the two were not the same code.
        assert all(verdict["time over torch's"][0] > 2 for verdict in by_rows.values()), case
    assert json.loads((tmp_path / "measured.json").read_text())["cpu"] == {}


def test_a_shape_is_listed_with_the_longest_run_of_counts_that_were_won() -> None:
    assert longest_run([1, 2, 4, 8], [True, False, True, True]) == [4, 8]
    assert longest_run([1, 2], [True, False]) == [1, 1]
    assert longest_run([1, 2], [False, False]) is None
