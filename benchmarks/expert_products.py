"""An adapted product of experts on a CPU: expert after expert, and all experts at once.

    python -m benchmarks.expert_products

Prints CPU seconds of a forward and a backward pass as paired ratios to the frozen product, looped and grouped, by the
number of experts and the rows of each, by which `grouping_pays` in `lora/functional/expert_rows.py` chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.machine import load, machine
from benchmarks.timing import interleave, paired_ratio
from lightning_lora.lora.functional import AdaptedWeight
from lightning_lora.lora.functional.expert_rows import ExpertRows, GroupedRows, LoopedRows
from lightning_lora.lora.functional.fused_experts import fused_expert_linear

EXPERTS = (4, 8, 16, 32, 64, 128)
ROWS = (1, 4, 16, 64, 256)
SHAPES = ((64, 64), (256, 512), (768, 1024))


def ways(
    num_experts: int, rows: int, num_in: int, num_out: int, rank: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Forward and backward of a frozen product, and of both ways to add its update; every expert has as many rows."""
    make = partial(torch.randn, dtype=dtype)
    counts = [rows] * num_experts
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    x, d_y = make(rows * num_experts, num_in).requires_grad_(), make(rows * num_experts, num_out)
    W = make(num_experts, num_out, num_in) / num_in**0.5
    A = torch.randn(num_experts, rank, num_in).requires_grad_()
    B = torch.randn(num_experts, num_out, rank).requires_grad_()

    def base(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, matrices, offs=ends)

    def adapted(expert_rows: ExpertRows) -> object:
        y = fused_expert_linear(x, AdaptedWeight(W, None, A, B, 0.5), expert_rows, product=base)
        return torch.autograd.grad(y, (x, A, B), d_y)

    return {
        "frozen": lambda: torch.autograd.grad(base(x, W.mT), x, d_y),
        "looped": partial(adapted, LoopedRows(counts)),
        "grouped": partial(adapted, GroupedRows(ends)),
    }


def cpu_seconds(function: Callable[[], object], calls: int) -> float:
    """Of one call on this process's CPUs, the mean of several."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before, where = load(), machine(torch.device("cpu"))
    print(f"Looped, grouped; rank {arguments.rank}, {arguments.dtype}\n")
    print(f"| in, out; experts | {' | '.join(map(str, arguments.rows))} rows each |")
    print(f"|---{'|---' * len(arguments.rows)}|")
    for num_in, num_out in SHAPES:
        for num_experts in arguments.experts:
            cells = []
            for rows in arguments.rows:
                dtype = getattr(torch, arguments.dtype)
                measured = ways(num_experts, rows, num_in, num_out, arguments.rank, dtype)
                calls = max(1, round(5e-3 / max(cpu_seconds(measured["grouped"], 2), 1e-5)))
                timed = {name: partial(cpu_seconds, way, calls) for name, way in measured.items()}
                times = interleave(timed, arguments.repetitions, warmups=2)
                ratios = [paired_ratio(times[way], times["frozen"]).median for way in measured if way != "frozen"]
                cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
            print(f"| {num_in}, {num_out}; {num_experts} | {' | '.join(cells)} |", flush=True)
    print(f"\n{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}; ", end="")
    print(f"load {before} before, {load()} after")


if __name__ == "__main__":
    main()
