from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lightning_lora.study.matched.record import CURVE, read_curve
from tests.study.matched import killed
from tests.support import toys, warm

pytestmark = [*toys.expected_warnings, pytest.mark.slow]


@pytest.mark.filterwarnings("ignore:took over", "ignore:removed 1 unfinished temporary")
def test_a_run_that_is_killed_continues_from_its_own_checkpoint_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    process = warm.Process(killed.__file__, str(tmp_path / "killed"))
    checkpoints = tmp_path / "killed" / "run" / "checkpoints"
    until = time.monotonic() + 60
    while len(list(checkpoints.glob("*.ckpt"))) < 1 or len((tmp_path / "killed/steps.txt").read_text().split()) < 30:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill_all()
    steps = tmp_path / "killed" / "steps.txt"
    before = len(steps.read_text().split())
    found = killed.run(tmp_path / "killed", 0.0)
    after = [int(step) for step in steps.read_text().split()][before:]
    assert after[0] >= before - 2, "only what came after the last checkpoint is done again"
    assert after[-1] == 47
    whole = killed.run(tmp_path / "whole", 0.0)
    assert torch.equal(found.rows.loss_sum, whole.rows.loss_sum)
    assert (found.steps, found.tokens) == (whole.steps, whole.tokens) == (48, 384)
    curves = [read_curve(tmp_path / name / "run" / CURVE) for name in ("killed", "whole")]
    assert [(p.step, p.tokens, p.train_loss, p.val_loss) for p in curves[0]] == [
        (p.step, p.tokens, p.train_loss, p.val_loss) for p in curves[1]
    ]
