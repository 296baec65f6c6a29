"""Saves and loads checkpoints under many strategies in one process group: ``python matrix.py FOLDER RANKS``.

The cells to run are in ``FOLDER/cells-RANKS.json``. What each has seen goes beside it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.callbacks import AdapterCheckpoint, CheckpointGuard, LoRAGuard
from lightning_lora.patterns import plain_name
from lightning_lora.sharding import shard_lora
from lightning_lora.tasks.token_loss import TokenWeightedLoss
from tests import toys
from tests.integration.fsdp1_on_cpu import BlockwiseFSDPOnCPU, FSDPOnCPU

NUM_ROWS, BATCH, STEP = 20, 2, 8
"""Rows in all, of a batch on one rank, and of a step: each epoch has two whole ones and a short one of 4."""
SAVED_AT, LAST = 2, 4
"""Optimizer steps."""


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
    """Adapters, a head trained in full, and an optimizer whose order is not that of the module."""

    def __init__(self, lora: LoRAConfig | None) -> None:
        super().__init__(lora=lora)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = Blocks()

    def configure_model(self) -> None:
        if getattr(self, "is_built", False):
            return
        self.is_built = True
        torch.manual_seed(1)
        self.apply_lora()
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard_lora(self.net, self.device_mesh)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        mask = batch["labels"] != -100
        wanted = batch["input_ids"] / 150 - 1
        return self.token_loss(((self.net(batch["input_ids"]) - wanted).square() * mask).sum(), mask.sum())

    def configure_optimizers(self) -> Any:
        groups = self.lora_parameter_groups(1e-2 if self.lora is None else 1e-3)
        for group in groups:
            group["params"].reverse()
        return torch.optim.AdamW(groups)


LORA = LoRAConfig(rank=2, targets=["up", "down"], trainable=["head"])
METHODS: dict[str, LoRAConfig | None] = {"lora": LORA, "full": None}


def strategy(name: str, ranks: int) -> Any:
    made: dict[str, Any] = {
        "single": lambda: "auto",
        "ddp": lambda: "ddp",
        "fsdp2": lambda: ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False),
        "fsdp1": BlockwiseFSDPOnCPU,
        "fsdp2-shards": lambda: ModelParallelStrategy(ranks, 1),
        "fsdp1-shards": lambda: BlockwiseFSDPOnCPU(state_dict_type="sharded"),
        "fsdp1-lightning": FSDPOnCPU,
    }
    return made[name]()


class Watch(Callback):
    """What weights and optimizer state are, read without the help of any checkpoint: when training starts and ends."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["start"] = state(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["end"] = state(trainer)


def state(trainer: Trainer) -> dict[str, Any]:
    """Whole trained weights, and Adam's moments and step by parameter name; all ranks must call."""
    model, (optimizer,) = trainer.strategy.model, trainer.optimizers
    assert model is not None
    if isinstance(model, FullyShardedDataParallel):
        return _state_of_fsdp1(model, optimizer)
    named = {name: p for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    return {
        "weights": {name: whole(parameter) for name, parameter in named.items()},
        "optimizer": {
            name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
            for name, parameter in named.items()
            if parameter in optimizer.state
        },
    }


def _state_of_fsdp1(model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    configs = FullStateDictConfig(False, False), FullOptimStateDictConfig(False, False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *configs):
        moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        weights = {plain_name(name): whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return {
        "weights": weights,
        "optimizer": {name: {key: whole(value) for key, value in of.items()} for name, of in moments.items()},
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(
    folder: Path, cell: str, method: str, name: str, ranks: int, load: Path | None, save: Path | None, steps: int
) -> None:
    """Train to ``steps``, from ``load`` if given; write ``save``, and what was seen or the error as ``CELL.pt``."""
    module, watch, out = Toy(METHODS[method]), Watch(), folder / f"run-{cell}"
    callbacks: list[Callback] = [watch, LoRAGuard(), CheckpointGuard()]
    if method == "lora":
        callbacks.append(AdapterCheckpoint(str(out / "adapters")))
    trainer = toys.trainer(
        out,
        devices=ranks,
        strategy=strategy(name, ranks),
        use_distributed_sampler=False,
        accumulate_grad_batches=STEP // BATCH // ranks,
        max_epochs=-1,
        max_steps=steps,
        callbacks=callbacks,
    )
    rows: Any = toys.token_rows(NUM_ROWS)
    sampler = DistributedSampler(rows, num_replicas=ranks, rank=trainer.global_rank, shuffle=False)
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler)
    error = None
    try:
        trainer.fit(module, loader, ckpt_path=load, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
    except (Exception, CheckpointException) as caught:  # what the cell shows; the next one goes on
        error = f"{type(caught).__name__}: {caught}"
    if trainer.global_rank == 0:
        torch.save({"seen": watch.seen, "error": error}, folder / f"{cell}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    for cell in json.loads((folder / f"cells-{ranks}.json").read_text()):
        load, save = (None if cell[key] is None else folder / cell[key] for key in ("load", "save"))
        run(folder, cell["cell"], cell["method"], cell["strategy"], ranks, load, save, cell["steps"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
