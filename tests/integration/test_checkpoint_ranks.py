"""Two ranks have one checkpoint: the first writes it, both verify it, and both continue from the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.files.checkpoint_manifest import SUFFIX
from tests.integration.scripts import two_rank_checkpoints
from tests.support import warm


@pytest.mark.slow
def test_ranks_write_verify_and_fall_back_together(tmp_path: Path) -> None:
    warm.run_ranks(2, two_rank_checkpoints.__file__, tmp_path)
    files = ",".join(f"step={step}.ckpt{suffix}" for step in (4, 8) for suffix in ("", SUFFIX))
    for rank in (0, 1):
        listing, differing, resumed = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert listing == files
        assert "the ranks have loaded different checkpoints: rank 0 ('step=8.ckpt'" in differing
        assert "Is the folder the same on all machines?" in differing
        assert resumed == "step=4.ckpt 12"
