"""Time of `head_loss` against ``cross_entropy(linear(...))``, forward and backward with a frozen head, interleaved.

    python -m benchmarks.head_loss --threads 2

Prints a Markdown table of paired ratios (10th percentile, median, 90th), after checking loss and gradient.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import load, machine
from benchmarks.timing import Clock, interleave, paired_ratio
from benchmarks.workloads import IGNORED
from lightning_lora.tasks import head_chunks
from lightning_lora.tasks.head_loss import head_loss

USUAL = 0


def step(rows: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient; ``rows`` in a chunk, or the usual way."""
    if rows == USUAL:
        loss = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORED, reduction="sum")
    else:
        loss = head_loss(hidden, weight, labels, chunk_rows=rows)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def seconds(rows: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Of `step`."""
    clock = Clock(hidden.device)
    step(rows, hidden, weight, labels)
    clock.mark()
    return clock.intervals()[0]


def measure(arguments: argparse.Namespace, vocab: int, share: float) -> str:
    """A row of the table, from tensors drawn for it."""
    tokens, dim = arguments.tokens, arguments.dim
    weight = torch.randn(vocab, dim) / dim**0.5
    hidden, labels = torch.randn(tokens, dim, requires_grad=True), torch.randint(vocab, (tokens,))
    labels[int(share * tokens) :] = IGNORED
    inputs = hidden, weight, labels[torch.randperm(tokens)]
    loss, gradient = step(USUAL, *inputs)
    for rows in arguments.rows:
        found, found_gradient = step(rows, *inputs)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    ways = {str(rows): partial(seconds, rows, *inputs) for rows in (USUAL, *arguments.rows)}
    times = interleave(ways, arguments.repetitions, warmups=1)
    usual = times[str(USUAL)]
    ratios = [paired_ratio(times[str(rows)], usual) for rows in arguments.rows]
    cells = [f"{ratio.p10:.2f} **{ratio.median:.2f}** {ratio.p90:.2f}" for ratio in ratios]
    return f"| {vocab:,} | {share:.0%} | {1e3 * statistics.median(usual):.0f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--rows", type=int, nargs="+", default=[head_chunks.CHUNK_ROWS])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before, where = load(), machine(torch.device("cpu"))
    print(f"| vocabulary | supervised | usual, ms | {' | '.join(f'{n} rows a chunk' for n in arguments.rows)} |")
    print(f"|---|---|---{'|---' * len(arguments.rows)}|")
    for vocab in arguments.vocab:
        for share in (1.0, 0.5):
            print(measure(arguments, vocab, share), flush=True)
    print(f"\n{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}; ", end="")
    print(f"load {before} before, {load()} after")


if __name__ == "__main__":
    main()
