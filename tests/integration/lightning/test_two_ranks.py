"""Two processes: a LightningModule that `shard_lora` shards as a whole, and each kind of DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.lightning import adapted_runs, ddp_variants, sharded_module
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


def test_every_kind_of_ddp_trains_the_adapters_alike_on_both_ranks(tmp_path: Path) -> None:
    warm.run_ranks(2, ddp_variants.__file__, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(one) == len(ddp_variants.KINDS) * len(adapted_runs.WAYS)
    for run, adapters in one.items():
        assert toys.same(adapters, other[run])
        for name, tensor in adapters.items():
            torch.testing.assert_close(tensor, one["ddp", run[1]][name])
