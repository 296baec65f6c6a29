"""Two measured steps on two ranks: ``python monitored_ranks.py STRATEGY FOLDER`` writes their samples to ``RANK.json``.

Both see the same weights and rows, so Adam's second moment after the first is the square of its gradient.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora.sharding import shard_lora
from lightning_lora.strategies import FSDP2Strategy
from tests import toys
from tests.callbacks.test_batch_size_monitor import Double
from tests.metered import Metered

NUM_ROWS, BATCH, ACCUMULATE = 32, 4, 4
EPS = 1e-3


class Sharded(Double):
    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self.net, self.device_mesh)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=0.0, betas=(0.9, 0.0), eps=EPS)


def sampler(rank: int) -> DistributedSampler[Any]:
    return DistributedSampler(toys.rows(NUM_ROWS), 2, rank, shuffle=False)


def run(strategy: str, folder: Path) -> None:
    monitor = Metered(spaces=("adapter", "adam"), weight_space_every=1)
    strategies: dict[str, Any] = {
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
        "deferring": FSDP2Strategy(),
    }
    trainer = toys.trainer(
        folder,
        devices=2,
        strategy=strategies[strategy],
        use_distributed_sampler=False,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[monitor],
        max_epochs=2,
    )
    loader = DataLoader(toys.rows(NUM_ROWS), BATCH, sampler=sampler(trainer.global_rank))
    trainer.fit(Sharded(), loader)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(monitor.samples))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
