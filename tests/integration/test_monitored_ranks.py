"""Two ranks give the monitor the samples that autograd gives by hand (V9 and V10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.batch.noise.noise_scale import signal_and_trace
from tests.integration.scripts import monitored_ranks as script
from tests.support import toys, warm
from tests.support.monitored import Double

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


def gradient(rows: list[int], of_base: bool = False) -> Tensor:
    """Of the adapters, or of the weights they are beside."""
    module: Any = Double()
    module.configure_model()
    if of_base:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.endswith(".weight"))
    data = toys.rows(script.NUM_ROWS)
    batch = [torch.stack([data[row][part] for row in rows]) for part in range(2)]
    module.training_step(batch, 0).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("strategy", "num_micro_batches", "tolerance"), [("ddp", 8, 1e-12), ("fsdp2", 4, 1e-5), ("deferring", 4, 1e-5)]
)
def test_a_step_of_two_ranks_is_measured_as_if_by_hand(
    strategy: str, num_micro_batches: int, tolerance: float, tmp_path: Path
) -> None:
    warm.run_ranks(2, script.__file__, strategy, tmp_path)
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    first, second = found["samples"]
    assert other["samples"] == [first, second]
    ranks = [list(script.sampler(rank)) for rank in range(2)]
    windows = [range(start, start + script.BATCH) for start in range(0, 16, script.BATCH)]
    micro_batches = [[rank[place] for place in window] for rank in ranks for window in windows]
    if strategy != "ddp":
        micro_batches = [one + other for one, other in zip(micro_batches[:4], micro_batches[4:], strict=True)]
    gradients = torch.stack([gradient(rows) for rows in micro_batches])
    assert first["adapter"] == second["adapter"] == by_hand(gradients, tolerance)
    scaled = gradients / (gradients.mean(0).abs() + script.EPS)
    assert second["adam"] == by_hand(scaled, tolerance)
    assert "adam" not in first
    if strategy == "ddp":
        rows = torch.stack([gradient([row], of_base=True) for row in range(script.NUM_ROWS)])
        assert first["weight"] == by_hand(rows, tolerance)
    else:
        assert "weight" not in first
        assert found["said"].count("frozen weights is not measured: layers are sharded") == 1
        assert found["refused"].startswith("under FSDP2 all ranks together are one micro-batch")


def by_hand(gradients: Tensor, tolerance: float) -> Any:
    size = script.NUM_ROWS // len(gradients)
    signal, trace = signal_and_trace(gradients.square().sum(1), gradients.mean(0).square().sum(), size)
    numbers = [pytest.approx(float(number), rel=tolerance) for number in (signal, trace)]
    return [*numbers, script.NUM_ROWS, len(gradients)]
