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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora.batch.noise.step_meter import StepMeter
from lightning_lora.errors import ConfigError
from lightning_lora.sharding import FSDP2Strategy, shard_lora
from tests.support import toys
from tests.support.metered import Metered
from tests.support.monitored import Double

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


class Told(Metered):
    """Keeps what is said of the frozen weights, and of a step of one micro-batch."""

    said: str
    refused = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().on_train_start(trainer, pl_module)
        self.said = " ".join(str(warning.message) for warning in caught)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.accumulate_grad_batches = 1
            try:
                StepMeter(trainer, pl_module)
            except ConfigError as reason:
                self.refused = str(reason)


def sampler(rank: int) -> DistributedSampler[Any]:
    return DistributedSampler(toys.rows(NUM_ROWS), 2, rank, shuffle=False)


def run(strategy: str, folder: Path) -> None:
    monitor = Told(measures_adam=True, frozen_weights_every=1)
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
    (folder / f"{trainer.global_rank}.json").write_text(
        json.dumps({"samples": monitor.samples, "said": monitor.said, "refused": monitor.refused})
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
