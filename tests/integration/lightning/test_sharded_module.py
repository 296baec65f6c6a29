"""A LightningModule may be given to `shard_lora` as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.lightning import sharded_module
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


def test_a_module_that_is_sharded_whole_computes_in_every_step_what_one_device_computes(tmp_path: Path) -> None:
    single = sharded_module.run(1, tmp_path)
    warm.run_ranks(2, sharded_module.__file__, 2, tmp_path)
    double = torch.load(tmp_path / "2.pt")
    assert double["sharded"]
    assert single["losses"][4:].sum() < 0.99 * single["losses"][:4].sum()
    for name in ("losses", "predict", "validate", "test"):
        torch.testing.assert_close(double[name], single[name], rtol=1e-5, atol=1e-6)
    one, other = (torch.load(tmp_path / f"{ranks}.ckpt", weights_only=True)["state_dict"] for ranks in (1, 2))
    assert one.keys() == other.keys()
    assert "scale" not in one
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
