"""Two ranks have one checkpoint: the first writes it, both verify it, and both continue from the same file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora.checkpoint_manifest import SUFFIX
from tests import toys
from tests.integration import two_rank_checkpoints
from tests.integration.ports import free_port


@pytest.mark.slow
def test_ranks_write_verify_and_fall_back_together(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}
    command = [sys.executable, two_rank_checkpoints.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    files = ",".join(f"step={step}.ckpt{suffix}" for step in (4, 8) for suffix in ("", SUFFIX))
    for rank in (0, 1):
        listing, differing, resumed = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert listing == files
        assert "the ranks have loaded different checkpoints: rank 0 ('step=8.ckpt'" in differing
        assert "Is the folder the same on all machines?" in differing
        assert resumed == "step=4.ckpt 12"
