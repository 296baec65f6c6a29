"""An adapted linear layer in parts, by shape: where forming ``W + scale B A`` pays, and how narrow products are best.

    python -m benchmarks.products --threads 2

Prints two Markdown tables. First, forward and backward of one layer with its update added (split) or folded in first
(merged), as paired ratios to the frozen layer. Second, how long narrow products take as they are usually written,
compared with the order of `lightning_lora.lora.functional.narrow_products`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import load, machine
from benchmarks.timing import interleave, paired_ratio, seconds
from lightning_lora.lora.functional.fused_linear import FusedLinears
from lightning_lora.lora.functional.linear_group import GroupTensors, Settings
from lightning_lora.lora.functional.narrow_products import fast_layout, transposed_times_narrow

SHAPES = ((64, 64), (64, 256), (128, 128), (128, 512), (512, 128), (256, 256), (256, 1024), (512, 512), (512, 1408))


def layer(tokens: int, num_in: int, num_out: int, rank: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of a frozen layer, and of both ways to add its update."""
    x, d_y = torch.randn(tokens, num_in, requires_grad=True), torch.randn(tokens, num_out)
    W = torch.randn(num_out, num_in) / num_in**0.5
    A, B = torch.randn(rank, num_in, requires_grad=True), torch.randn(num_out, rank, requires_grad=True)

    def adapted(merges: bool) -> object:
        outputs: Any = FusedLinears.apply(
            Settings((0.5,), merges=merges), x.detach(), *GroupTensors([None], [W], [A], [B], [x]).flat()
        )
        (y,) = outputs
        return torch.autograd.grad(y, (x, A, B), d_y)

    return {
        "frozen": lambda: torch.autograd.grad(F.linear(x, W), x, d_y),
        "split": partial(adapted, merges=False),
        "merged": partial(adapted, merges=True),
    }


def narrow(tokens: int, num_out: int, rank: int) -> dict[str, Callable[[], object]]:
    """Both narrow products of a backward pass, as usually written and in our order."""
    y, B, inner = torch.randn(tokens, num_out), torch.randn(num_out, rank), torch.randn(tokens, rank)
    return {
        "y B": lambda: y @ B,
        "ours y B": lambda: y @ fast_layout(B),
        "y^T inner": lambda: y.T @ inner,
        "ours y^T inner": lambda: transposed_times_narrow(y, inner),
    }


def timed(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, as many calls at a time as fill some milliseconds."""
    first = next(iter(ways.values()))
    first()
    calls = max(1, round(5e-3 / seconds(first)))
    measures = {name: partial(seconds, way, calls) for name, way in ways.items()}
    return interleave(measures, repetitions, warmups=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before, where = load(), machine(torch.device("cpu"))
    print(f"Split, merged; rank {arguments.rank}\n\n| in, out | {' | '.join(map(str, arguments.tokens))} tokens |")
    print(f"|---{'|---' * len(arguments.tokens)}|")
    for num_in, num_out in SHAPES:
        cells = []
        for tokens in arguments.tokens:
            times = timed(layer(tokens, num_in, num_out, arguments.rank), arguments.repetitions)
            split, merged = (paired_ratio(times[way], times["frozen"]).median for way in ("split", "merged"))
            cells.append(f"{split:.2f}, {merged:.2f}")
        print(f"| {num_in}, {num_out} | {' | '.join(cells)} |", flush=True)
    print("\nUsual order / ours, 1,024 tokens, 512 columns\n\n| rank | `y B` | `y^T inner` |\n|---|---|---|")
    for rank in (1, 2, 4, 8, 12, 16, 32):
        times = timed(narrow(1024, 512, rank), arguments.repetitions)
        ratios = [paired_ratio(times[way], times[f"ours {way}"]).median for way in ("y B", "y^T inner")]
        print(f"| {rank} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)
    print(f"\n{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}; ", end="")
    print(f"load {before} before, {load()} after")


if __name__ == "__main__":
    main()
