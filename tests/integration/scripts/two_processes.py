"""A module that shards itself, and a run of two processes: ``python two_processes.py STRATEGY FOLDER``.

``FOLDER`` holds the llama; adapter folder, merged model and final adapters go to ``FOLDER/STRATEGY``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRAConfig, LoRAMixin, lora_state_dict
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import AdapterCheckpoint, LoRAGuard, MergeOnFitEnd
from lightning_lora.sharding import shard_lora
from lightning_lora.tasks import CausalLM
from tests.support import toys

NUM_ROWS = 20
GLOBAL_BATCH = 8
"""Rows of a step, so that each epoch ends with a short one of 4."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum(-1)


class Toy(LoRAMixin, TokenWeightedLoss):
    """A user's module that shards itself."""

    lora = LoRAConfig(rank=2, targets=["up", "down"], trainable=["head"])

    def __init__(self) -> None:
        super().__init__()
        self.net = Blocks()

    def configure_model(self) -> None:
        # Launching two processes resets the seed, one device does not.
        torch.manual_seed(1)
        self.apply_lora()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self.net, self.device_mesh)

    def errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask = batch["labels"] != -100
        wanted = batch["input_ids"] / 150 - 1
        return ((self.net(batch["input_ids"]) - wanted).square() * mask).sum(), mask.sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.token_loss(*self.errors(batch))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, count = self.errors(batch)
        # Not synchronised: every rank has a value of its own, as many users have it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.log("val_loss", loss / count)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3))


def data(ranks: int, rank: int) -> Any:
    rows: Any = toys.token_rows(NUM_ROWS)
    sampler = DistributedSampler(rows, num_replicas=ranks, rank=rank, shuffle=False)
    return DataLoader(rows, batch_size=GLOBAL_BATCH // 2 // ranks, sampler=sampler)


def run(strategy: str, folder: Path) -> None:
    seed_everything(0, verbose=False)
    out = folder / strategy
    module = CausalLM(str(folder / "llama"), 1e-3, lora=LoRAConfig(rank=2))
    callbacks: list[Callback] = [LoRAGuard(), AdapterCheckpoint(monitor="val_loss")]
    if strategy == "ddp":
        callbacks.append(MergeOnFitEnd())
    trainer = toys.trainer(
        out,
        devices=2,
        strategy="ddp" if strategy == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        max_epochs=2,
        num_sanity_val_steps=1,
        callbacks=callbacks,
    )
    loader = data(2, trainer.global_rank)
    trainer.fit(module, loader, loader)
    # The loss was computed in the place of the head, whose weight FSDP2 shards.
    assert module._head_is_last
    state = lora_state_dict(module)
    if trainer.is_global_zero:
        torch.save(state, out / "final.pt")


if __name__ == "__main__":
    for line in toys.EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=line.split(":")[1])
    run(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
