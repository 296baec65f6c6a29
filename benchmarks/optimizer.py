"""Ways to update the factors: torch's three AdamWs over the list of factors, and fused AdamW over one flat tensor.

    python -m benchmarks.optimizer --workload tiny char-gpt-128 llama-28m qwen3-moe --threads 1

Prints a Markdown table: milliseconds of clipping (where asked), ``step`` and ``zero_grad``, interleaved, and what each
flat way would save of the whole training step, which is measured in the same process.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from benchmarks.contenders import LEARNING_RATE, ours
from benchmarks.machine import disturbed, load, machine
from benchmarks.setting import prepared
from benchmarks.timing import Clock, interleave, train_step
from benchmarks.workloads import WORKLOADS

# So many steps before those that count, in which states are made and caches settle.
WARMUPS = 5
NAMES = LOOP, FOREACH, FUSED, COPIED, FLAT = "loop", "foreach", "fused", "flat, copied", "flat, bound"


class Update(NamedTuple):
    """One way to update.

    Args:
        leaves: What a backward leaves gradients in and clipping sees.
        step: From those gradients to new factors.
    """

    leaves: list[nn.Parameter]
    step: Callable[[], object]


def updates(factors: Sequence[Tensor]) -> dict[str, Update]:
    """Every way, each with factors of its own."""

    def over_list(foreach: bool = False, fused: bool = False) -> Update:
        leaves = [nn.Parameter(factor.clone()) for factor in factors]
        return Update(leaves, AdamW(leaves, lr=LEARNING_RATE, foreach=foreach, fused=fused).step)

    return {
        LOOP: over_list(),
        FOREACH: over_list(foreach=True),
        FUSED: over_list(fused=True),
        COPIED: flat_copied(factors),
        FLAT: flat_alone(factors),
    }


def flat_alone(factors: Sequence[Tensor]) -> Update:
    """The bound: factors and gradients lie in one tensor already, which no module or backward could use as it is."""
    flat = nn.Parameter(torch.cat([factor.flatten() for factor in factors]))
    return Update([flat], AdamW([flat], lr=LEARNING_RATE, fused=True).step)


def flat_copied(factors: Sequence[Tensor]) -> Update:
    """What is possible with factors that stay tensors of their own: gradients copied in, new factors copied out."""
    leaves = [nn.Parameter(factor.clone()) for factor in factors]
    (flat,), flat_step = flat_alone(factors)
    parts = flat.detach().split([leaf.numel() for leaf in leaves])
    views = [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)]

    @torch.no_grad()
    def step() -> None:
        flat.grad = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        flat_step()
        torch._foreach_copy_(list[Tensor](leaves), views)

    return Update(leaves, step)


def seconds(update: Update, clip: bool) -> float:
    """Of one update with gradients that a backward would have left."""
    for leaf in update.leaves:
        leaf.grad = torch.randn_like(leaf)
    clock = Clock(update.leaves[0].device)
    if clip:
        clip_grad_norm_(update.leaves, 1.0)
    update.step()
    for leaf in update.leaves:
        leaf.grad = None
    clock.mark()
    return clock.intervals()[0]


def rows(name: str, rank: int, repetitions: int, steps: int, device: torch.device) -> list[str]:
    """Of the table: one workload without and with clipping."""
    with prepared(WORKLOADS[name], rank, device) as (base, adapter, batch):
        trainee = ours(base, adapter)
        whole = statistics.median([train_step(trainee, batch).step for _ in range(steps + 1)][1:])
    assert trainee.optimizer is not None
    factors = [p.detach() for group in trainee.optimizer.param_groups for p in group["params"]]
    size = f"{name} | {rank} | {len(factors)} | {sum(f.numel() for f in factors):,} | {whole * 1e3:.1f}"
    return [f"| {size} | {cells} |" for cells in (_cells(factors, clip, repetitions, whole) for clip in (False, True))]


def _cells(factors: Sequence[Tensor], clip: bool, repetitions: int, whole: float) -> str:
    """Medians of every way, and what the flat ones save of the whole step, paired by repetition."""
    ways = {way: partial(seconds, update, clip) for way, update in updates(factors).items()}
    times = interleave(ways, repetitions, WARMUPS)
    cells = ["yes" if clip else "no", *(f"{statistics.median(times[way]) * 1e3:.2f}" for way in NAMES)]
    for way in (COPIED, FLAT):
        saved = [fused - flat for fused, flat in zip(times[FUSED], times[way], strict=True)]
        cells.append(f"{statistics.median(saved) / whole:.2%}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["tiny"], choices=WORKLOADS, help="one or more")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 1], help="one or more")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5, help="whole training steps timed, for the shares")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    before, where = load(), machine(arguments.device)
    titles = [
        "",
        "rank",
        "tensors",
        "numbers",
        "whole step, ms",
        "clipping",
        *NAMES,
        f"{COPIED}: saves",
        f"{FLAT}: saves",
    ]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in arguments.workload:
        for rank in arguments.rank:
            print("\n".join(rows(name, rank, arguments.repetitions, arguments.steps, arguments.device)), flush=True)
    after = load()
    print(f"\n{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['versions']['torch']}; load")
    print(f"{before} before, {after} after{'; DISTURBED by other programs' if disturbed(before, after) else ''}.")


if __name__ == "__main__":
    main()
