"""Save under one strategy, go on under another: every pair is right, or refused with a message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.consolidate import consolidate
from tests import toys
from tests.integration import matrix
from tests.integration.matrix import LAST, METHODS, SAVED_AT
from tests.integration.test_distributed import free_port

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SHARDS = ("fsdp2-shards", "fsdp1-shards")
SAVED = ("single", "ddp", "fsdp2", "fsdp1", *SHARDS)
LOADED = ("single", "ddp", "fsdp2", "fsdp1")


def cell(method: str, strategy: str, load: str | None = None, save: str | None = None) -> dict[str, Any]:
    name = f"{method}-{strategy}" if load is None else f"{load.removesuffix('.ckpt')}-to-{strategy}"
    steps = SAVED_AT if load is None else LAST
    return {"cell": name, "method": method, "strategy": strategy, "load": load, "save": save, "steps": steps}


def launch(folder: Path, ranks: int, cells: list[dict[str, Any]]) -> None:
    """Run the cells one after the other in ``ranks`` processes."""
    (folder / f"cells-{ranks}.json").write_text(json.dumps(cells))
    environment = {"PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, matrix.__file__, str(folder), str(ranks)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def reads(saved: str, loaded: str) -> bool:
    """Whether ``loaded`` reads what ``saved`` has written: a folder of shards is for its own kind, or for ours."""
    return saved not in SHARDS or loaded in ("single", "ddp") or saved.startswith(loaded)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files, and what every cell has seen."""
    folder = tmp_path_factory.mktemp("matrix")
    for method in METHODS:
        matrix.run(folder, f"{method}-single", method, "single", 1, None, folder / f"{method}-single.ckpt", SAVED_AT)
        matrix.run(folder, f"{method}-truth", method, "single", 1, None, None, LAST)
    two = [cell(method, saved, save=f"{method}-{saved}.ckpt") for method in METHODS for saved in SAVED[1:]]
    two += [
        cell(method, loaded, f"{method}-{saved}.ckpt") for method in METHODS for saved in SAVED for loaded in LOADED[1:]
    ]
    launch(folder, 2, two)
    for method in METHODS:
        for shards in SHARDS:
            consolidate(folder / f"{method}-{shards}.ckpt", folder / f"{method}-{shards}-whole.ckpt")
    return folder


def seen(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_goes_on(folder: Path, method: str, saved: str, name: str) -> None:
    """The run started with exactly what was saved, and ended where the uninterrupted one did."""
    found = seen(folder, name)
    assert found["error"] is None, found["error"]
    before, truth = seen(folder, f"{method}-{saved}")["seen"]["end"], seen(folder, f"{method}-truth")["seen"]["end"]
    assert before["optimizer"].keys() == before["weights"].keys()
    torch.testing.assert_close(found["seen"]["start"], before, rtol=0, atol=0)
    torch.testing.assert_close(found["seen"]["end"], truth, rtol=1e-5, atol=1e-5)
    assert {float(of["step"]) for of in truth["optimizer"].values()} == {LAST}


@pytest.mark.parametrize("loaded", LOADED[1:])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_go_on_from_what_any_strategy_saved(folder: Path, method: str, saved: str, loaded: str) -> None:
    name = f"{method}-{saved}-to-{loaded}"
    if reads(saved, loaded):
        assert_goes_on(folder, method, saved, name)
    else:
        found = seen(folder, name)
        print(found["error"])
        assert "start" not in found["seen"]
