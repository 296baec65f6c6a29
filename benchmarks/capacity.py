"""What low-rank updates can store: random labels, of which the bits are known, learned by a softmax readout of rank r.

    python -m benchmarks.capacity --seeds 10

The first table shows which share of the labels' bits a readout has stored, for so many bits per free parameter; a
matrix of rank r has ``r (in + out) - r^2`` of them. The second one shows what adapters store at the rank that
`capacity_table` calls needed, and at rank 8 where that is lower.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.planning.capacity import capacity_table, needed_rank
from lightning_lora.planning.count_data import count_data

INPUTS, CLASSES = 48, 32
STEPS, RATE = 4000, 0.1
RANKS, LOADS = (1, 2, 4, 8), (0.5, 1.0, 2.0, 4.0)
ROWS = (20, 60, 120, 240)
FLOOR = 8


class Readout(nn.Module):
    """A linear layer that predicts nothing, until it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(INPUTS, CLASSES, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.scores.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


def free_parameters(rank: int) -> int:
    """Free parameters of a readout of this rank."""
    return rank * (INPUTS + CLASSES) - rank**2


def num_rows(rank: int, load: float) -> int:
    """Rows of which the labels have ``load`` bits for each free parameter."""
    return round(load * free_parameters(rank) / math.log2(CLASSES))


def random_labels(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal inputs ``(rows, in)`` and uniform labels ``(rows,)``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (rows,), generator=generator)


def stored(scores: Tensor, labels: Tensor) -> Tensor:
    """The share of the labels' bits that scores ``(..., rows, classes)`` have stored, ``(...)``."""
    losses = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return 1 - losses.mean(-1) / math.log(CLASSES)


def store_at_load(rank: int, load: float, seeds: int, steps: int = STEPS) -> Tensor:
    """Train a readout of ``rank`` for each seed; the shares that they have stored, ``(seeds,)``."""
    pairs = [random_labels(num_rows(rank, load), seed) for seed in range(seeds)]
    x, labels = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(seeds)
    A = (2 * torch.rand(seeds, rank, INPUTS, generator=generator, dtype=torch.float64) - 1) / INPUTS**0.5
    B = torch.zeros(seeds, CLASSES, rank, dtype=torch.float64)

    def scores() -> Tensor:
        return (x @ A.mT) @ B.mT

    _train([A.requires_grad_(), B.requires_grad_()], scores, labels, steps)
    return stored(scores().detach(), labels)


def needed(rows: int, seed: int) -> int:
    """The rank that the capacity table calls needed for random labels."""
    counts = count_data(DataLoader(TensorDataset(*random_labels(rows, seed))))
    rank = needed_rank(capacity_table(Readout(), counts))
    assert rank is not None
    return rank


def store_in_adapters(rows: int, seed: int, rank: int, steps: int = STEPS) -> float:
    """The share of random labels that adapters of a rank store."""
    x, labels = random_labels(rows, seed)
    torch.manual_seed(seed)
    readout = Readout()
    inject_lora(readout, LoRAConfig(rank=rank))
    factors = [parameter for parameter in readout.parameters() if parameter.requires_grad]
    _train(factors, lambda: readout(x), labels, steps)
    return float(stored(readout(x).detach(), labels))


def _train(parameters: Sequence[Tensor], scores: Callable[[], Tensor], labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(scores().flatten(0, -2), labels.flatten(), reduction="sum") / labels.shape[-1]).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    print(f"{arguments.seeds} seeds, {arguments.steps} steps of Adam on all rows; {INPUTS} inputs, {CLASSES} classes")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| rank | free parameters | rows | bits per parameter | stored: mean | least | most | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for rank in RANKS:
        for load in LOADS:
            start = time.perf_counter()
            shares = store_at_load(rank, load, arguments.seeds, arguments.steps)
            print(
                f"| {rank} | {free_parameters(rank)} | {num_rows(rank, load)} | {load} | {shares.mean():.3f} | "
                f"{shares.min():.3f} | {shares.max():.3f} | {time.perf_counter() - start:.1f} |",
                flush=True,
            )
    print("\n| rows | bits of the labels, about | rank | stored: mean | least | seeds with 98 % or more |")
    print("|---|---|---|---|---|---|")
    for rows in ROWS:
        ranks = [needed(rows, seed) for seed in range(arguments.seeds)]
        _print_row(rows, "needed", ranks, arguments.steps)
        _print_row(rows, f"needed, at least {FLOOR}", [max(FLOOR, rank) for rank in ranks], arguments.steps)


def _print_row(rows: int, what: str, ranks: list[int], steps: int) -> None:
    shares = torch.tensor([store_in_adapters(rows, seed, rank, steps) for seed, rank in enumerate(ranks)])
    names = ", ".join(map(str, sorted(set(ranks))))
    print(
        f"| {rows} | {rows * math.log2(CLASSES):.0f} | {names} ({what}) | {shares.mean():.3f} | {shares.min():.3f} | "
        f"{int((shares >= 0.98).sum())} of {len(shares)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
