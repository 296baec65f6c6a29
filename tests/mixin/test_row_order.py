"""The order of training rows under a strategy with processes, in real runs of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import toys

pytestmark = [*toys.expected_warnings, pytest.mark.slow]
CODE = """
import sys
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tests.support import toys

class Seeing(toys.Toy):
    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained += batch[2].tolist()
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated += batch[2].tolist()

module = Seeing()
rows = TensorDataset(*toys.rows(9).tensors, torch.arange(9))
own = DistributedSampler(rows, 1, 0, shuffle=False) if sys.argv[3] == "own" else None
strategy = ModelParallelStrategy() if sys.argv[2] == "shards" else sys.argv[2]
run = toys.trainer(sys.argv[1], strategy=strategy)
run.fit(module, DataLoader(rows, 2, sampler=own), DataLoader(rows, 2))
import json; print(json.dumps([module.trained, module.validated]))
"""
ORDER = list(range(9))


@pytest.mark.parametrize("strategy", ["ddp", "shards"])
@pytest.mark.parametrize("sampler", ["none", "own"])
def test_rows_that_lightning_shuffles_are_told(strategy: str, sampler: str, tmp_path: Path) -> None:
    done = toys.run_python(CODE, tmp_path, strategy, sampler)
    trained, validated = json.loads(done.stdout.strip().splitlines()[-1])
    assert validated == ORDER
    assert sorted(trained) == ORDER
    assert (trained != ORDER) == (sampler == "none")
    assert ("the training loader does not shuffle" in done.stdout + done.stderr) == (sampler == "none")
