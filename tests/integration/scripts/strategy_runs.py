"""Runs of twenty optimizer steps: ``python strategy_runs.py RANKS FOLDER STRATEGY/TASK ...``, one process per rank.

They are made one after the other in one process group. ``checks/NAME`` in the place of a run makes one of the checks of
`fsdp2_checks`.

What a run has computed goes to ``FOLDER/STRATEGY/TASK.pt``: the loss of every optimizer step, the norm of its gradient
before and after clipping, all weights at the end, and the tokens of every micro-batch of each rank.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRAConfig
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import AdapterCheckpoint, LoRAGuard
from lightning_lora.lora.shards import reshard
from lightning_lora.sharding import FSDP2Strategy
from lightning_lora.sharding.collectives import gather_on_rank_zero
from lightning_lora.tasks import CausalLM
from tests.integration.scripts import two_processes
from tests.integration.scripts.fsdp1_on_cpu import BlockwiseFSDPOnCPU
from tests.support import toys

NUM_ROWS, MICRO_BATCH, WINDOW, NUM_EPOCHS = 40, 4, 3, 5
"""Ten micro-batches of all ranks together make an epoch: three windows of three and a short one, four steps."""
NUM_STEPS = 20
CLIP = 0.05
"""Below the norm of every gradient of these runs."""


class Traced(TokenWeightedLoss):
    """Remembers of every optimizer step its loss per token over all ranks, and the norm of its gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window: list[Tensor] = []
        self.counts: list[int] = []
        self.losses: list[float] = []
        self.norms: list[tuple[float, float]] = []

    def token_loss(self, loss_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
        self.window.append(torch.stack([loss_sum.detach().double(), torch.as_tensor(num_tokens, dtype=torch.float64)]))
        self.counts.append(int(num_tokens))
        return super().token_loss(loss_sum, num_tokens)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        total = torch.stack(self.window).sum(0)
        if self.trainer.world_size > 1:
            # With tensor parallelism each row is counted twice, which divides out.
            torch.distributed.all_reduce(total)
        self.losses.append(float(total[0] / total[1]))
        self.window = []

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        before = norm(self)
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append((before, norm(self)))


class Toy(Traced, two_processes.Toy):
    """The toy, by AdamW or by SGD."""

    def __init__(self, lora: LoRAConfig | None, sgd: bool = False) -> None:
        super().__init__()
        self.lora, self.sgd = lora, sgd

    def configure_optimizers(self) -> Any:
        # AdamW does not see a gradient's length, so clipping is told by SGD.
        return torch.optim.SGD(self.parameters(), lr=2.0) if self.sgd else super().configure_optimizers()


class LM(Traced, CausalLM):
    """The task."""


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def norm(module: LightningModule) -> float:
    gradients = [whole(p.grad).flatten() for p in module.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm())


ADAPTERS: Any = two_processes.Toy.lora
TASKS: dict[str, Any] = {
    "toy-lora": lambda folder: Toy(ADAPTERS),
    "toy-dora": lambda folder: Toy(replace(ADAPTERS, dora=True)),
    "toy-full": lambda folder: Toy(None),
    "toy-lora-clip": lambda folder: Toy(ADAPTERS, sgd=True),
    "toy-full-clip": lambda folder: Toy(None, sgd=True),
    "toy-lora-bf16": lambda folder: Toy(ADAPTERS),
    # At ten times this rate the run is chaotic: rounding grows a thousandfold in a few steps.
    "llm-lora": lambda folder: LM(str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2)),
    "llm-lora-bf16": lambda folder: LM(str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2, trainable=["model.norm"])),
    "llm-full": lambda folder: LM(str(folder / "llama"), 1e-3),
}
STARTS: dict[str, Any] = {
    "toy-pissa": lambda folder: Toy(replace(ADAPTERS, init="pissa")),
    "toy-orthogonal": lambda folder: Toy(replace(ADAPTERS, init="orthogonal")),
    "toy-gradient": lambda folder: Toy(replace(ADAPTERS, init="gradient", init_batches=3)),
    "llm-pissa": lambda folder: LM(str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2, init="pissa")),
}
"""Adapters with other first values."""
QUANTISED: dict[str, Any] = {
    "llm-nf4": lambda folder: LM(str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2), quantization="nf4"),
    "llm-nf4-gradient": lambda folder: LM(
        str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2, init="gradient"), quantization="nf4"
    ),
}
"""For DDP only, and where bitsandbytes is installed."""
STRATEGIES: dict[str, Any] = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp1": BlockwiseFSDPOnCPU,
    "fsdp2": FSDP2Strategy,
    "fsdp2-deferring": lambda: FSDP2Strategy(defer_gradients=True),
    "tp": lambda: FSDP2Strategy(tensor_parallel_size=2),
    "tp-and-data": lambda: FSDP2Strategy(tensor_parallel_size=2),
    "fsdp2-chatty": lambda: FSDP2Strategy(defer_gradients=False),
}


def loader(num_replicas: int, rank: int) -> Any:
    """The share of the rows of one of ``num_replicas`` groups of processes."""
    rows: Any = toys.token_rows(NUM_ROWS)
    sampler = DistributedSampler(rows, num_replicas, rank, shuffle=False)
    return DataLoader(rows, batch_size=MICRO_BATCH // num_replicas, sampler=sampler)


def run(ranks: int, folder: Path, strategy: str, task: str) -> None:
    seed_everything(0, verbose=False)
    module = (TASKS | STARTS | QUANTISED)[task](folder)
    # Only the outermost wrapper of FSDP1 can put weights together, which a folder is written by.
    folders = [AdapterCheckpoint(dirpath=str(folder / strategy / f"{task}-adapters"))] if strategy == "fsdp1" else []
    trainer = toys.trainer(
        folder / strategy,
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        use_distributed_sampler=False,
        accumulate_grad_batches=WINDOW,
        max_epochs=NUM_EPOCHS,
        gradient_clip_val=CLIP if task.endswith("clip") else None,
        precision="bf16-mixed" if task.endswith("bf16") else "32-true",
        callbacks=[LoRAGuard(), *folders] if module.lora is not None else [],
        enable_checkpointing=bool(folders),
    )
    split = 2 if strategy.startswith("tp") else 1
    # Processes that split the layers follow each other, and see the same rows.
    trainer.fit(module, loader(ranks // split, trainer.global_rank // split))
    assert trainer.global_step == NUM_STEPS
    reshard(module)
    weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
    counts = gather_on_rank_zero(module.counts)
    if trainer.is_global_zero:
        found = {"losses": module.losses, "norms": module.norms, "weights": weights, "counts": counts}
        torch.save(found, folder / strategy / f"{task}.pt")


def main(ranks: str, folder: str, *names: str) -> None:
    for line in toys.EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=line.split(":")[1])
    for name in names:
        strategy, _, task = name.partition("/")
        (Path(folder) / strategy).mkdir(exist_ok=True)
        if strategy == "checks":
            fsdp2_checks.CHECKS[task](Path(folder))
        else:
            run(int(ranks), Path(folder), strategy, task)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # The checks import this module.
    from tests.integration.scripts import fsdp2_checks

    main(*sys.argv[1:])
