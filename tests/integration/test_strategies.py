"""Two processes train what one device trains: twenty steps, unequal tokens, a short window at every epoch's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys
from tests.integration import strategy_runs
from tests.integration.test_distributed import free_port

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

RUNS = [f"{strategy}/{task}" for strategy in ("ddp", "fsdp2") for task in strategy_runs.TASKS]
# Each way of communicating gradients where it is not the default.
OTHERS = ["fsdp2-chatty/toy-lora", "fsdp2-deferring/toy-full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in it, of one device and of two processes."""
    folder = tmp_path_factory.mktemp("strategies")
    toys.save_llama(folder / "llama")
    for task in strategy_runs.TASKS:
        strategy_runs.run(1, folder, "single", task)
    environment = {"PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, strategy_runs.__file__, "2", str(folder), *RUNS, *OTHERS],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"MASTER_PORT": free_port()},
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


def traces(folder: Path, run: str) -> tuple[Any, Any]:
    """What the run has computed, and what one device has."""
    task = run.partition("/")[2]
    return torch.load(folder / f"{run}.pt"), torch.load(folder / "single" / f"{task}.pt")


@pytest.mark.parametrize("run", [name for name in RUNS if not name.endswith("bf16")] + OTHERS)
def test_two_processes_compute_what_one_device_computes(run: str, folder: Path) -> None:
    found, expected = traces(folder, run)
    assert len(found["losses"]) == strategy_runs.NUM_STEPS
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [name for name in RUNS if name.endswith("bf16")])
def test_in_bf16_they_differ_by_its_rounding(run: str, folder: Path) -> None:
    found, expected = traces(folder, run)
    # One unit in the last place of bfloat16 is 2^-8.
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=2**-7, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=2**-7)


def test_the_runs_are_hard_enough(folder: Path) -> None:
    found, expected = traces(folder, "ddp/toy-full")
    (one, other), (single,) = found["counts"], expected["counts"]
    assert len(one) == len(other) == len(single) == 10 * strategy_runs.NUM_EPOCHS
    # Tokens differ between the ranks, and between micro-batches.
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert len(set(single)) > 1
    # The last window of an epoch is a single micro-batch.
    assert 10 % strategy_runs.WINDOW == 1
    assert expected["losses"][-1] < 0.7 * expected["losses"][0]


@pytest.mark.parametrize("run", [name for name in RUNS if name.endswith("clip")])
def test_clipping_is_by_the_norm_over_all_ranks(run: str, folder: Path) -> None:
    for before, after in traces(folder, run)[0]["norms"]:
        assert before > 2 * strategy_runs.CLIP
        assert after == pytest.approx(strategy_runs.CLIP, rel=1e-4)
