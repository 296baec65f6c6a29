"""Whether the capacity monitor and the rank probe tell full adapters from others, on teachers whose rank is known.

    python -m benchmarks.saturation [SEEDS]

Prints the table of docs/understand/capacity.md: 10 seeds take about three minutes on one core.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_lora import RankProbe
from lightning_lora.callbacks import CapacityMonitor
from lightning_lora.study.rank_branches import grown_module, raised_ranks
from lightning_lora.study.rank_probe_result import RankProbeResult
from tests.capacity.teacher import BATCH, Kind, RankedStudent, monitored, rows
from tests.support import toys

DECAYED: tuple[tuple[Kind, int], ...] = (
    *(("flat", rank) for rank in (1, 4, 8, 16, 48)),
    *(("power law", rank) for rank in (4, 8, 32, 48)),
)
CONSTANT: tuple[tuple[Kind, int], ...] = (("flat", 4), ("flat", 16), ("power law", 4), ("power law", 8))


def probed(folder: Path, rank: int, seed: int) -> tuple[RankProbeResult, float]:
    """A rank probe of a student of the rank-8 teacher, and the largest change of an output through growth."""
    module = RankedStudent(rank, 0, seed, learning_rate=6e-4)
    trainer = toys.trainer(folder)
    trainer.fit(module, DataLoader(rows("flat", 4096, 1000 + seed), BATCH))
    x = torch.randn(256, 48, generator=torch.Generator().manual_seed(seed))
    grown = grown_module(module, raised_ranks(module, 2), seed)
    with torch.no_grad():
        change = float((grown.get_submodule("layer")(x) - module.layer(x)).abs().max())
    result = RankProbe(min_epoch=0).run(
        module,
        DataLoader(rows("flat", 4096, 3000 + seed), BATCH),
        DataLoader(rows("flat", 512, 7000 + seed), BATCH),
        optimizer_state=trainer.optimizers[0].state_dict(),
    )
    return result, change


def monitor_line(kind: Kind, rank: int, monitors: list[CapacityMonitor], rate: str) -> str:
    """A row of the table: medians over seeds, and how often each verdict was given."""
    readings = [monitor.reading for monitor in monitors]
    cut = statistics.median(reading.truncation or 0.0 for reading in readings)
    captures = [reading.capture for reading in readings if reading.capture is not None]
    highs = [reading.capture_high for reading in readings if reading.capture_high is not None]
    capture = f"{statistics.median(captures):.2f}, at most {max(highs):.2f}" if captures else "-"
    verdicts = Counter(monitor.verdict for monitor in monitors)
    told = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
    return f"| {kind} | {rank} | {rate} | {cut:.1%} | {capture} | {told} |"


def main(seeds: int) -> None:
    started = time.perf_counter()
    print("| teacher | rank | learning rate | lost at half rank | capture, upper end | verdict, of seeds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rate, cases in (("to zero", DECAYED), ("constant", CONSTANT)):
            for kind, rank in cases:
                found = [monitored(folder, kind, rank, decays=rate == "to zero", seed=seed) for seed in range(seeds)]
                print(monitor_line(kind, rank, found, rate), flush=True)
        print("\n| rank of 8 | doubled: gain, nats | standard error | confirmed | largest change by growth |")
        print("|---|---|---|---|---|")
        for rank in (4, 16):
            results, changes = zip(*(probed(folder, rank, seed) for seed in range(seeds)), strict=True)
            gain, error = (statistics.median(getattr(each, of) for each in results) for of in ("gain", "error"))
            confirmed = sum(result.confirmed for result in results)
            print(f"| {rank} | {gain:+.3f} | {error:.4f} | {confirmed} of {seeds} | {max(changes):.1e} |", flush=True)
    print(f"\n{seeds} seeds, {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
