"""A LightningModule that shards itself as a whole: ``python sharded_module.py RANKS FOLDER``.

What each step has computed goes to ``FOLDER/RANKS.pt``, the checkpoint to ``FOLDER/RANKS.ckpt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.sharding import FSDP2Strategy, shard_lora
from tests.integration.scripts.two_processes import Block
from tests.support import toys

ROWS = 8


class Whole(LoRAMixin):
    """Its layers are its own children, and a parameter is its own."""

    lora = LoRAConfig(rank=2, alpha=2, targets=["up", "down"], trainable=["head"])

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(8, 1)
            self.scale = nn.Parameter(torch.ones(8))
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        torch.manual_seed(1)
        self.apply_lora()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self, self.device_mesh)

    def forward(self, batch: Tensor) -> Tensor:
        x = batch * self.scale
        for block in self.blocks:
            x = block(x)
        return (self.head(x) - batch.sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Both ways must do: by the call, which FSDP2 sees itself, and past it.
        loss = self(batch) if batch_idx % 2 else self.forward(batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.forward(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.forward(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3))


def run(ranks: int, folder: Path) -> dict[str, Any]:
    """Train two epochs, then validate, test and predict."""
    strategy = FSDP2Strategy() if ranks > 1 else "auto"
    trainer = toys.trainer(
        folder,
        devices=ranks,
        strategy=strategy,
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=[LoRAGuard()],
    )
    rows: Any = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    rank = trainer.global_rank
    sampler = DistributedSampler(rows, num_replicas=ranks, rank=rank, shuffle=False)
    loader = DataLoader(rows, batch_size=2 // ranks, sampler=sampler)
    module = Whole()
    trainer.fit(module, loader, loader)
    found: dict[str, Any] = {"sharded": any(isinstance(p, DTensor) for p in module.parameters())}
    trainer.save_checkpoint(folder / f"{ranks}.ckpt")
    found["validate"] = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
    found["test"] = trainer.test(module, loader, verbose=False)[0]["test_loss"]
    predicted = trainer.predict(module, loader)
    assert predicted is not None
    found["predict"] = mean_of_ranks(trainer, torch.stack(predicted))  # pyright: ignore[reportArgumentType]
    found["losses"] = mean_of_ranks(trainer, torch.stack(module.losses))
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")
    return found


def mean_of_ranks(trainer: Any, numbers: Tensor) -> Tensor:
    return trainer.strategy.reduce(numbers, reduce_op="mean")


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
