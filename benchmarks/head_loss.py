"""Time of `head_loss` against ``cross_entropy(linear(...))``, forward and backward with a frozen head, interleaved.

    python benchmarks/head_loss.py --threads 2

Prints a Markdown table of paired ratios (10th percentile, median, 90th), after checking loss and gradient.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.functional import head_loss

MODULE: Any = importlib.import_module("lightning_lora.functional.head_loss")
USUAL = 0


def step(rows: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, loss and gradient; ``rows`` in a chunk, or the usual way."""
    hidden = hidden.clone().requires_grad_()
    start = time.perf_counter()
    if rows == USUAL:
        loss = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=-100, reduction="sum")
    else:
        MODULE.CHUNK_ROWS = rows
        loss = head_loss(hidden, weight, labels)
    loss.backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None
    return seconds, loss.detach(), hidden.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--rows", type=int, nargs="+", default=[MODULE.CHUNK_ROWS])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print(f"| vocabulary | supervised | usual, ms | {' | '.join(f'{rows} rows a chunk' for rows in args.rows)} |")
    print(f"|---|---|---{'|---' * len(args.rows)}|")
    for vocab in args.vocab:
        weight = torch.randn(vocab, args.dim) / args.dim**0.5
        for share in (1.0, 0.5):
            hidden, labels = torch.randn(args.tokens, args.dim), torch.randint(vocab, (args.tokens,))
            labels[int(share * args.tokens) :] = -100
            labels = labels[torch.randperm(args.tokens)]
            contenders = [USUAL, *args.rows]
            _, loss, gradient = step(USUAL, hidden, weight, labels)
            for rows in args.rows:  # also the warm-up
                _, found, found_gradient = step(rows, hidden, weight, labels)
                torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
                assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm()
            times: dict[int, list[float]] = {rows: [] for rows in contenders}
            for _ in range(args.repetitions):
                for rows in random.sample(contenders, len(contenders)):
                    times[rows].append(step(rows, hidden, weight, labels)[0])
            cells = []
            for rows in args.rows:
                ratios = [ours / usual for ours, usual in zip(times[rows], times[USUAL], strict=True)]
                low, *_, high = statistics.quantiles(ratios, n=10)
                cells.append(f"{low:.2f} **{statistics.median(ratios):.2f}** {high:.2f}")
            usual = 1000 * statistics.median(times[USUAL])
            print(f"| {vocab:,} | {share:.0%} | {usual:.0f} | {' | '.join(cells)} |", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
