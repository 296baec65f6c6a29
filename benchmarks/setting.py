"""What all contenders of a run share: base weights, one adapter, one batch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.adapters import Adapter, make_adapter
from benchmarks.workloads import Batch, Workload
from lightning_lora import LoRAConfig


class Setting(NamedTuple):
    """A base model that nobody has adapted yet, an adapter that fits it, and what it is trained on."""

    base: nn.Module
    adapter: Adapter
    batch: Batch


@contextmanager
def prepared(
    workload: Workload,
    rank: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    supervised: float = 1.0,
    seed: int = 0,
) -> Iterator[Setting]:
    """Everything random, from ``seed``; the adapter's folder is gone afterwards."""
    torch.manual_seed(seed)
    base = workload.build().to(device, dtype)
    batch = Batch(*(tensor.to(device) for tensor in workload.batch(supervised, seed)))
    # The rate is the same for everyone; the multiplier is ours alone.
    config = LoRAConfig(rank=rank, lr_multiplier=1.0)
    with tempfile.TemporaryDirectory() as folder:
        yield Setting(base, make_adapter(copy.deepcopy(base), config, Path(folder) / "adapter", seed), batch)


def fresh_copy(base: nn.Module, own_weights: bool) -> nn.Module:
    """A copy of ``base`` in training mode; unless it needs its own weights it shares them, so that many fit."""
    model = copy.deepcopy(base)
    if not own_weights:
        for mine, shared in zip(model.parameters(), base.parameters(), strict=True):
            mine.data = shared.data
    return model.train()
