"""Strategies that train in child processes leave the module of the calling process trained, as in plain Lightning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.scripts import child_processes
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a llama."""
    folder = tmp_path_factory.mktemp("children")
    toys.save_llama(folder / "llama")
    return folder


def seen(folder: Path, strategy: str, kind: str, devices: int = 1) -> dict[str, Any]:
    """What the calling process has found in its module; each run is made once."""
    path = folder / f"{strategy}-{kind}.json"
    if not path.exists():
        warm.run_ranks(1, child_processes.__file__, folder, strategy, devices, kind)
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["mixin", "applied", "late", "callback", "late-callback", "task"])
def test_the_caller_has_what_the_children_trained(kind: str, folder: Path) -> None:
    found = seen(folder, "ddp_fork", kind)
    assert found["same"] == [True, True]
    # Children that start from the module of the caller compute what the caller computes.
    if kind != "task":
        assert found["validated"] == pytest.approx(found["losses"][1], rel=1e-5)
    assert found["adapters"] == (14 if kind == "task" else 2)
    assert found.get("reloaded", True)


@pytest.mark.parametrize("kind", ["plain", "applied"])
def test_it_is_what_one_process_trains(kind: str, folder: Path) -> None:
    # Adapters that exist before are the same in both.
    assert seen(folder, "ddp_fork", kind)["losses"] == pytest.approx(seen(folder, "ddp", kind)["losses"], rel=1e-4)


@pytest.mark.parametrize(("strategy", "kind"), [("ddp_notebook", "mixin"), ("ddp_spawn", "mixin")])
def test_the_other_ways_to_start_children_are_alike(strategy: str, kind: str, folder: Path) -> None:
    devices = 2 if strategy == "ddp_notebook" else 1
    found = seen(folder, strategy, kind, devices)
    assert all(found["same"])
    assert found["losses"][-1] < 1
