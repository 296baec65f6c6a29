from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.study.bank import arms
from tests.study.bank.arms import THREE, Trained
from tests.support import toys

pytestmark = toys.expected_warnings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return arms.apart(THREE, model, tmp_path_factory.mktemp("apart"))


def test_arms_in_turns_are_runs_of_their_own_bit_for_bit(
    model: Path, apart: dict[str, Trained], tmp_path: Path
) -> None:
    found, _ = arms.side_by_side(THREE, model, tmp_path, "turns")
    assert {name: arms.gap(found[name], apart[name]) for name in THREE} == dict.fromkeys(THREE, 0.0)


def test_arms_in_one_batch_are_runs_of_their_own_up_to_rounding(
    model: Path, apart: dict[str, Trained], tmp_path: Path
) -> None:
    found, bank = arms.side_by_side(THREE, model, tmp_path, "rows")
    assert not bank.why_turns
    print(bank.shared_passes, {name: arms.gap(found[name], apart[name]) for name in THREE})
    for name in THREE:
        assert arms.gap(found[name], apart[name]) < 1e-5
