"""Trains on two ranks with a capacity monitor or without, and writes weights and readings: STRATEGY FOLDER."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.callbacks import CapacityMonitor
from lightning_lora.lora.shards import full_tensor
from lightning_lora.sharding import shard_lora
from tests.support import toys


class Sharded(toys.Toy):
    """Is sharded by FSDP2 under a strategy with a mesh; its learning rate falls to zero in 12 steps."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.apply_lora()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self.net, self.device_mesh)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class SavesInside(Callback):
    """A checkpoint in mid-epoch, inside an accumulation window."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 8:
            trainer.save_checkpoint(self.path)


def trained(
    strategy: str, folder: Path, callbacks: list[Callback], ckpt_path: Path | None = None
) -> tuple[dict[str, Tensor], int]:
    """All weights after training, and the rank."""
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
    settings: dict[str, Any] = {"devices": 2, "strategy": kinds[strategy], "max_epochs": 1}
    trainer = toys.trainer(folder, accumulate_grad_batches=2, callbacks=callbacks, **settings)
    module = Sharded()
    loaders = DataLoader(toys.rows(96), 2, shuffle=True), toys.loader(8, seed=3)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}, trainer.global_rank


def run(strategy: str, folder: Path) -> None:
    monitor, resumed, path = CapacityMonitor(), CapacityMonitor(), folder / "inside.ckpt"
    saves: list[Callback] = [SavesInside(path)] if strategy == "ddp" else []
    alone, rank = trained(strategy, folder, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched, _ = trained(strategy, folder, [monitor, *saves])
    said = [str(each.message) for each in caught if "capacity monitor" in str(each.message)]
    found = {"same": toys.same(alone, watched), "said": said, "reading": monitor.reading.to_dict()}
    if saves:
        again, _ = trained(strategy, folder, [resumed], path)
        found |= {"same_again": toys.same(alone, again), "resumed": resumed.reading.to_dict()}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
