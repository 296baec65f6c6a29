"""Two ranks are trained as without a capacity monitor: DDP measures the same on both, FSDP2 says that it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.scripts import capacity_ranks as script
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


def run(strategy: str, folder: Path) -> list[dict[str, Any]]:
    warm.run_ranks(2, script.__file__, strategy, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_of_ddp_measure_the_same(tmp_path: Path) -> None:
    first, second = run("ddp", tmp_path)
    assert first["same"]
    assert second["same"]
    assert first["reading"] == second["reading"]
    assert first["reading"]["tokens"] == 96
    assert first["reading"]["capture_rate"] <= 0.1
    assert (first["said"], second["said"]) == ([], [])
    assert (tmp_path / "capacity.png").exists()
    # A run that goes on inside an epoch, and inside a window, has shown each rank a part of the epoch only.
    for found in (first, second):
        assert found["same_again"]
        assert found["resumed"] == first["reading"]


def test_sharded_ranks_are_trained_and_not_measured(tmp_path: Path) -> None:
    first, second = run("fsdp2", tmp_path)
    assert first["same"]
    assert second["same"]
    assert len(first["said"]) == 1
    assert "ModelParallelStrategy shards the module" in first["said"][0]
    assert first["reading"]["loss"] is None
