"""How arms share a process where the study does not say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.cli.study.arms import resolve
from lightning_lora.study.bank.groups import side_by_side
from lightning_lora.study.bank.mode import chosen_mode
from lightning_lora.study.matched.checks.built import build_arm
from lightning_lora.study.matched.spec import read_spec
from tests.cli.study.test_study_command import ARMS, write
from tests.study.bank.kinds import Task, rows
from tests.study.bank.odd_modules import net

CASES = {
    "inexact": (["", "dropout (1) draws"], 64, True, "turns", "they cannot share batches: dropout (1) draws"),
    "GPU": ([""], 64, False, "turns", "was not measured on a GPU"),
    "unknown": ([""], None, True, "turns", "theirs are not known"),
    "large": ([""], 1024, True, "turns", "batches of up to 1,024 tokens"),
    "small": ([""], 128, True, "rows", "of 128 tokens at most"),
}


@pytest.mark.parametrize(("reasons", "tokens", "is_cpu", "mode", "why"), CASES.values(), ids=list(CASES))
def test_batches_are_shared_where_that_is_exact_and_known_to_be_faster(
    reasons: list[str], tokens: int | None, is_cpu: bool, mode: str, why: str
) -> None:
    found, reason = chosen_mode(reasons, tokens, is_cpu)
    assert found == mode
    assert why in reason


HOW = [(8, 256, "take turns: batches of up to 2,048"), (1, 64, "share batches: of 64")]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "length", "how"), HOW)
def test_a_study_says_how_its_arms_share_the_process(
    tmp_path: Path, size: int, length: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data: dict[str, Any] = {"data.init_args.batch_size": size, "data.init_args.max_length": length}
    spec = resolve(*read_spec(write(tmp_path, arms=ARMS, arms_per_device=2, overrides=data)), tmp_path)
    group = side_by_side(spec, {}, lambda jobs: ([], []))
    assert group is not None
    assert group.announcement()[0].startswith(f"arms side by side {how}")
    given = resolve(*read_spec(write(tmp_path, arms_per_device=2, arms_mode="rows", overrides=data)), tmp_path)
    group = side_by_side(given, {}, lambda jobs: ([], []))
    assert (given.arms_mode, group and group.announcement()) == ("rows", [])


def test_what_speaks_against_one_batch_is_known_from_the_built_module() -> None:
    def reason(lora: dict[str, Any], *middle: Any) -> str:
        built = build_arm("a", lambda: Task(net(*middle), {"rank": 2, **lora}, 1e-3, rows))
        assert built is not None
        return built.why_no_rows

    assert reason({}, lambda: torch.nn.BatchNorm1d(16)).startswith("batch normalisation (1)")
    assert reason({"dropout": 0.1}).startswith("lora.dropout")
    assert reason({}) == ""
