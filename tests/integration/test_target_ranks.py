"""A run keeps the rows of its steps when it goes on on another number of devices, and ranks agree on a micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.scripts import target_ranks as script
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Whole runs of one device; their checkpoints are in the folder."""
    return {kind: script.fit(folder, kind, 1) for kind in script.SAVED_AT}


@pytest.fixture(scope="module")
def pair(folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    """What the two ranks have done, which had the checkpoints of one device."""
    warm.run_ranks(2, script.__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks_agree_on_the_smallest_micro_batch(pair: list[dict[str, Any]]) -> None:
    assert [rank["ddp"][0] for rank in pair] == ["effective batch 8 = 2 rows x 2 accumulated x 2 devices"] * 2
    assert "a step of the 4 longest rows does not fit into memory" in pair[0]["ddp"][1]


def test_ranks_that_share_a_model_do_not_try(pair: list[dict[str, Any]]) -> None:
    batch, said = pair[0]["fsdp2"]
    assert batch == "effective batch 8 = 4 rows x 1 accumulated x 2 devices"
    assert any("4 rows are not tried: under ModelParallelStrategy ranks would wait" in line for line in said)


@pytest.mark.parametrize("kind", script.SAVED_AT)
def test_a_run_goes_on_on_another_number_of_devices_with_steps_of_the_same_rows(
    kind: str, folder: Path, alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    assert [rows for rows, _ in alone[kind]["steps"]] == ([8] * 6 if kind == "target" else [8] * 3 + [4] * 6)
    whole = [rank[f"{kind} whole"] for rank in pair]
    resumed = [rank[f"{kind} resumed"] for rank in pair]
    with pytest.warns(UserWarning, match="written by 2 ranks and is read by 1: .* window begins anew"):
        resumed.append(script.fit(folder, kind, 1, started_on=2))
    for other in (*whole, *resumed):
        same_steps(alone[kind], other)
    assert [len(other["steps"]) for other in resumed] == [len(alone[kind]["steps"]) - (4 if kind == "after" else 2)] * 3


def same_steps(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The steps of a run that went on are the last of the whole one, and both end in the same weights."""
    for (rows, rate), (other_rows, other_rate) in zip(reversed(one["steps"]), reversed(other["steps"]), strict=False):
        assert (other_rows, other_rate) == (rows, pytest.approx(rate, rel=1e-9))
    torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-10, atol=1e-12)
