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
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import AlreadyShardedError, LoRAConfig, LoRAMixin, lora_state_dict, merge_lora
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import AdapterCheckpoint, CheckpointGuard, LoRAGuard
from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.lora.patterns import plain_name
from lightning_lora.sharding import shard_lora
from lightning_lora.sharding.collectives import gather_on_rank_zero
from lightning_lora.tasks import CausalLM
from tests.integration.scripts.fsdp1_on_cpu import BlockwiseFSDPOnCPU, FSDPOnCPU
from tests.integration.scripts.two_processes import Blocks
from tests.support import toys

NUM_ROWS, BATCH, STEP = 20, 2, 8
"""Rows in all, of a batch on one rank, and of a step: each epoch has two whole ones and a short one of 4."""
SAVED_AT, LAST = 2, 4
"""Optimizer steps."""


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
        names = {id(parameter): plain_name(name) for name, parameter in self.named_parameters()}
        for group in groups:
            # The second block before the first: positions in this list are other parameters of the same shapes.
            group["params"].sort(key=lambda p: ("head" in names[id(p)], "blocks.0" in names[id(p)]))
        return torch.optim.AdamW(groups)


LORA = LoRAConfig(rank=2, targets=["up", "down"], trainable=["head"])
METHODS = ("lora", "full")
"""Of the toy; ``llm-lora`` and ``llm-full`` are a language model's, with clipping by norm."""


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
    """What weights and optimizer state are, read without the help of any checkpoint: when training starts and ends.

    And the bytes that the gradients of each rank take when the optimizer steps.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.gradient_bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["start"] = state(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        # FSDP1's are views of a unit's.
        storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in local}
        self.gradient_bytes = sum(storages.values())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["end"] = state(trainer)
        self.seen["gradient_bytes"] = gather_on_rank_zero(self.gradient_bytes)


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


def module_of(method: str, folder: Path) -> LightningModule:
    task, _, kind = method.rpartition("-")
    if task == "llm":
        return CausalLM(str(folder / "llama"), 1e-3, lora=LoRAConfig(rank=2) if kind == "lora" else None)
    return Toy(LORA if kind == "lora" else None)


def by_hand(trainer: Trainer, module: Any, adapter: Path) -> dict[str, Any]:
    """What a user does after ``fit`` under FSDP1: read the adapter of the wrapper, then of the module; write it."""
    assert trainer.model is not None
    read = lora_state_dict(trainer.model)
    refusals = []
    for refused in (lora_state_dict, merge_lora):
        try:
            refused(module)
        except AlreadyShardedError as error:
            refusals.append(str(error))
    module.save_adapter(adapter)
    return {"read": read, "refusals": refusals}


def run(folder: Path, ranks: int, cell: dict[str, Any]) -> None:
    """One cell: train from ``load`` to ``steps``, write ``save``, and what was seen, or the error, as ``CELL.pt``.

    A language model is validated after each epoch and tested at the end; with ``steps`` 0 it is tested only.
    """
    torch.manual_seed(1)
    watch, out = Watch(), folder / f"run-{cell['cell']}"
    callbacks: list[Callback] = [watch, LoRAGuard(patience=1), CheckpointGuard()]
    if cell["method"].endswith("lora"):
        callbacks.append(AdapterCheckpoint(str(out / "adapters")))
    trainer = toys.trainer(
        out,
        devices=ranks,
        strategy=strategy(cell["strategy"], ranks),
        use_distributed_sampler=False,
        accumulate_grad_batches=STEP // BATCH // ranks,
        # Lower than what the gradients of the language model are, so that each step is clipped.
        gradient_clip_val=0.1 if cell["method"].startswith("llm") else None,
        max_epochs=-1,
        max_steps=cell["steps"],
        callbacks=callbacks,
    )
    rows: Any = toys.token_rows(NUM_ROWS)
    sampler = DistributedSampler(rows, num_replicas=ranks, rank=trainer.global_rank, shuffle=False)
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler)
    load, error = cell["load"] and folder / cell["load"], None
    is_llm, module = cell["method"].startswith("llm"), module_of(cell["method"], folder)
    try:
        if cell["steps"]:
            trainer.fit(module, loader, loader if is_llm else None, ckpt_path=load, weights_only=True)
        if cell["save"]:
            trainer.save_checkpoint(folder / cell["save"])
            if not writes_shards(trainer.strategy):
                trainer.save_checkpoint(folder / f"{cell['save']}.weights", weights_only=True)
        if cell["cell"] == "lora-fsdp1-lightning":
            watch.seen["by hand"] = by_hand(trainer, module, out / "by-hand")
        if is_llm:
            ckpt_path = None if cell["steps"] else load
            watch.seen["test"] = trainer.test(module, loader, ckpt_path, verbose=False, weights_only=True)
    except (Exception, CheckpointException) as caught:  # what the cell shows; the next one goes on
        error = f"{type(caught).__name__}: {caught}"
    if trainer.global_rank == 0:
        torch.save({"seen": watch.seen, "error": error}, folder / f"{cell['cell']}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    for cell in json.loads((folder / f"cells-{ranks}.json").read_text()):
        run(folder, ranks, cell)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
