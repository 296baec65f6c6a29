"""A fixed rank, RankGrowth and allocated ranks at the same number of adapter parameters, each at its best rate.

    python -m benchmarks.rank_growth --seeds 0 1 2

A teacher is a small network plus updates of known rank: high in two of its layers, one in the others. Students start
from the network and learn the teacher's outputs. The learning rate of each method is the best of a sweep on seeds that
are not used for the comparison. Prints Markdown: errors of unseen rows, and paired differences with 95 % intervals.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import QUIET
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import RankGrowth
from lightning_lora.lora.allocation import allocate_ranks
from lightning_lora.lora.growth_plan import num_factor_parameters
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.student_t import t_quantile

WIDTH, DEPTH, ROWS, BATCH, STEPS, RANK = 32, 6, 1024, 32, 400, 4
HIGH_RANK, HIGH_LAYERS = 12, (1, 4)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = ("fixed", "grown", "allocated")


def network() -> nn.Sequential:
    """The base, the same for every seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))


def teacher(seed: int) -> nn.Sequential:
    """The base plus an update of rank 12 in two layers and of rank 1 in the others, with equal norms."""
    model = network()
    draw = torch.Generator().manual_seed(seed)
    for index, block in enumerate(model):
        rank = HIGH_RANK if index in HIGH_LAYERS else 1
        left, right = (torch.randn(WIDTH, rank, generator=draw) for _ in range(2))
        update = left @ right.T
        block.get_submodule("0").get_parameter("weight").data += 2.0 * update / update.norm()
    return model


class Student(LoRAMixin, LightningModule):
    """Learns the outputs of the teacher."""

    def __init__(self, lora: LoRAConfig, rate: float) -> None:
        super().__init__(lora=lora)
        self.net, self.rate, self.errors = network(), rate, list[float]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(self.rate / 10))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def rows(seed: int, count: int) -> TensorDataset:
    """Inputs, and outputs of the teacher, which is the same for seeds that differ by thousands."""
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, teacher(seed % 1000)(x))


def allocated(data: TensorDataset) -> LoRAConfig:
    """Ranks from the gradient of 8 batches, at the parameters of the fixed rank."""
    config, model = LoRAConfig(rank=RANK), network()
    batches = [data[index : index + BATCH] for index in range(0, 8 * BATCH, BATCH)]
    found = allocate_ranks(model, lambda batch: (model(batch[0]) - batch[1]).square().mean(), batches, config)
    ranks = {f"net.{name}": rank for name, rank in found.rank_pattern.items()}
    alphas = {f"net.{name}": alpha for name, alpha in found.alpha_pattern.items()}
    return LoRAConfig(rank=RANK, rank_pattern=ranks, alpha_pattern=alphas)


def train(method: str, rate: float, seed: int, folder: str) -> tuple[float, int]:
    """Mean squared error of unseen rows over the teacher's variance, and adapter parameters at the end."""
    data, unseen = rows(seed, ROWS), rows(seed + 5000, 1000)
    full = RANK * 2 * WIDTH * DEPTH
    config = {"fixed": LoRAConfig(rank=RANK), "grown": LoRAConfig(rank=RANK // 2, alpha=16.0)}.get(method)
    torch.manual_seed(seed)
    module = Student(config or allocated(data), rate)
    callbacks: list[Callback] = (
        [RankGrowth(max_rank=4 * RANK, budget=full, threshold=0.02)] if method == "grown" else []
    )
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=callbacks,
        **QUIET,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data, BATCH, shuffle=True))
    x, y = unseen.tensors
    with torch.no_grad():
        return float((module.net(x) - y).square().mean() / y.var()), num_factor_parameters(module)


def interval(pairs: list[float]) -> str:
    """The mean difference and its two-sided interval of 95 %, as two cells of a table."""
    mean = statistics.mean(pairs)
    half = t_quantile(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean:+.4f} | {mean - half:+.4f} to {mean + half:+.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100, 101])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    start = time.monotonic()
    errors: dict[str, list[float]] = {}
    print(
        "| method | learning rate | adapter parameters | error of unseen rows, by seed | mean |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            tried = {
                rate: statistics.mean(train(method, rate, seed, folder)[0] for seed in arguments.tuning_seeds)
                for rate in RATES
            }
            rate = min(tried, key=lambda rate: tried[rate])
            found = [train(method, rate, seed, folder) for seed in arguments.seeds]
            errors[method] = [error for error, _ in found]
            sizes = ", ".join(map(str, sorted({size for _, size in found})))
            cells = " ".join(f"{error:.4f}" for error in errors[method])
            print(f"| {method} | {rate:g} | {sizes} | {cells} | {statistics.mean(errors[method]):.4f} |", flush=True)
    print("\n| compared with fixed | mean difference | 95 % interval |\n|---|---|---|")
    for method in METHODS[1:]:
        pairs = [one - other for one, other in zip(errors[method], errors["fixed"], strict=True)]
        print(f"| {method} | {interval(pairs)} |")
    print(f"\n{STEPS} steps of {BATCH} rows, seeds {arguments.seeds}, {time.monotonic() - start:.0f} s; ", end="")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
