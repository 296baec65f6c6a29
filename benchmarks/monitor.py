"""What the batch-size monitor costs: steps it measures against steps it does not, in turns in one run.

    python -m benchmarks.monitor --workload tiny --threads 2 --out runs/benchmarks

A step is one optimizer step of two micro-batches, from the start of its first batch to the start of the next step's.
Every second one is measured. Writes ``<workload>-monitor.json`` and ``.md`` and prints the Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.machine import QUIET, disturbed, load, machine
from benchmarks.setting import fresh_copy, prepared
from benchmarks.timing import paired_ratio, spread
from benchmarks.trainer import BatchStarts, Ours
from benchmarks.workloads import WORKLOADS
from lightning_lora.callbacks import BatchSizeMonitor

ACCUMULATION = 2
WARMUP = 4
EVERY = 10
"""Optimizer steps between measured ones, the monitor's default."""


class Alternating(BatchSizeMonitor):
    """Measures every second step."""

    @override
    def _is_due(self, step: int) -> bool:
        return step % 2 == 1


def seconds(name: str, steps: int, rank: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of the steps that were not measured, and of each one's neighbour that was."""
    with prepared(WORKLOADS[name], rank, device) as setting, tempfile.TemporaryDirectory() as folder:
        starts = BatchStarts()
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=ACCUMULATION,
            callbacks=[starts, Alternating()],
            default_root_dir=folder,
            **QUIET,
        )
        batches: Any = [setting.batch] * (ACCUMULATION * (steps * 2 + WARMUP + 1))
        with warnings.catch_warnings():
            # One batch in memory needs no workers, and the same rows over and over are no data to learn from.
            warnings.simplefilter("ignore")
            trainer.fit(
                Ours(fresh_copy(setting.base, own_weights=False), setting.adapter), DataLoader(batches, batch_size=None)
            )
    begun = starts.moments[::ACCUMULATION][WARMUP:]
    took = [b - a for a, b in itertools.pairwise(begun)]
    return took[0::2], took[1::2]


def as_markdown(name: str, plain: list[float], measured: list[float]) -> str:
    """Both kinds of step, and what the monitor adds at its default pace."""
    ratio = paired_ratio(measured, plain)
    more = (ratio.median - 1) / EVERY
    rows = [
        f"## {name}: the batch-size monitor",
        "",
        "| step, ms | measured, ms | measured / step | added, one step in 10 measured |",
        "|---|---|---|---|",
        f"| {spread(plain).median * 1e3:.2f} | {spread(measured).median * 1e3:.2f} "
        f"| {ratio.median:.3f} [{ratio.p10:.3f}, {ratio.p90:.3f}] | {more:.2%} |",
    ]
    return "\n".join([*rows, "", f"Medians of {len(plain)} pairs of neighbours [10th, 90th percentile].", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="tiny", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=200, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    before = load()
    plain, measured = seconds(arguments.workload, arguments.steps, arguments.rank, arguments.device)
    after = load()
    markdown = as_markdown(arguments.workload, plain, measured)
    if disturbed(before, after):
        markdown += f"\n**The load exceeded the cores ({before:.1f} before, {after:.1f} after): unreliable.**\n"
    about = {"machine": machine(arguments.device), "load": [before, after], "plain": plain, "measured": measured}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.workload}-monitor.json").write_text(json.dumps(about, indent=1) + "\n")
    (arguments.out / f"{arguments.workload}-monitor.md").write_text(markdown)
    print(markdown)


if __name__ == "__main__":
    main()
