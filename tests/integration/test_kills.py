"""A run killed at any moment leaves a whole last checkpoint, and goes on from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def trials(io: str, count: int, folder: Path) -> dict[str, Any]:
    (done,) = warm.run_ranks(1, "-W", "ignore", "-m", "tests.integration.scripts.kill_trials", io, count, folder)
    return json.loads(done.stdout.splitlines()[-1])


def test_after_any_kill_there_is_a_whole_last_checkpoint_old_or_new(tmp_path: Path) -> None:
    result = trials("verified", 10, tmp_path)
    assert result["damaged"] == 0, result["problems"]
    assert result["killed while a temporary file was there"], "no kill hit a save: the test proves nothing"
    assert result["steps"][-1] > 0
    assert result["steps"] == sorted(result["steps"])


def test_the_kills_would_show_a_write_that_is_not_atomic(tmp_path: Path) -> None:
    assert trials("in_place", 10, tmp_path)["damaged"] > 0
