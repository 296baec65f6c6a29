"""What is logged of an evaluation is the mean over all its rows, whatever the batches and the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch

from tests.integration.lightning import uneven_rows as script
from tests.support import toys, warm

pytestmark = [*toys.expected_warnings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    script.write(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, dict[str, float]]:
    return {name: script.expected(name, folder) for name in script.BATCHES}


@pytest.mark.parametrize("name", script.BATCHES)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_one_device(name: str, batch_size: int, folder: Path, oracle: dict[str, Any]) -> None:
    for fn, metrics in script.measured(name, folder, batch_size).items():
        assert metrics == pytest.approx(oracle[name], rel=1e-5, abs=1e-5), fn


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[Any]:
    """What the two ranks have found."""
    warm.run_ranks(2, script.__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks(pair: list[Any], oracle: dict[str, Any]) -> None:
    for found, warned, _ in pair:
        assert not warned
        for (strategy, name, batch_size), logged in found.items():
            for fn, metrics in logged.items():
                assert metrics == pytest.approx(oracle[name], rel=1e-5, abs=1e-5), (strategy, batch_size, fn)


@pytest.mark.slow
def test_rows_that_lightning_shows_to_two_ranks_are_told(pair: list[Any]) -> None:
    (one, message), (other, _) = (told[9] for _, _, told in pair)
    assert sorted([*one, *other]) == sorted([*toys.rows(9).tensors[0][:, 0].tolist(), one[0]])
    assert len(message) == 1
    assert message[0].startswith("validate: 9 rows are evaluated as 10 on 2 devices: the sampler repeats 1 of them")
    for case in (8, "few"):
        assert pair[0][2][case][1] == []
