"""Padded against packed rows: places per epoch that hold no token, and time per epoch, on the embedded model and data.

    python -m benchmarks.packing --rows 96 --repetitions 3

Every repetition trains one epoch of each layout inside a Trainer, in an order drawn anew. Prints a Markdown table:
places and filled share of an epoch, its CPU seconds (median, all threads together), and the ratio to padded, paired
per repetition.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.machine import QUIET, load, machine
from lightning_lora import LoRAConfig
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM

PADDED = "padded"


class Layout(NamedTuple):
    """How the rows of an epoch are laid out."""

    packing: bool | str
    batch_size: int
    max_length: int


# Steps of about 16 examples each; no row of the sample is longer than 768 tokens.
LAYOUTS = {
    PADDED: Layout(False, 16, 1024),
    "`batch`, 16 examples": Layout("batch", 16, 1024),
    "`length`, 4 x 1,024": Layout("length", 4, 1024),
    "`length`, 5 x 768": Layout("length", 5, 768),
}


class Epoch(Callback):
    """Counts the places and the steps of an epoch, and its CPU seconds: others may use the machine too."""

    def __init__(self) -> None:
        self.places = self.steps = 0
        self.seconds = self._start = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.process_time()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        self.places += batch["input_ids"].numel()
        self.steps += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds = time.process_time() - self._start


def train(layout: Layout, rows: int | None) -> tuple[Epoch, float]:
    """One epoch, and the share of its places that hold tokens."""
    torch.manual_seed(0)
    epoch = Epoch()
    module = CausalLM(str(MODEL), lora=LoRAConfig(rank=32), dtype="float32")
    data = SFTDataModule(
        str(TRAIN), batch_size=layout.batch_size, max_length=layout.max_length, max_rows=rows, packing=layout.packing
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[epoch], default_root_dir=folder, **QUIET).fit(
            module, datamodule=data
        )
    return epoch, data.statistics["train"].tokens / epoch.places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, help="training rows of the sample; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before = load()
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    rows: dict[str, str] = {}
    for _ in range(arguments.repetitions):
        for name in random.sample(list(LAYOUTS), len(LAYOUTS)):
            epoch, share = train(LAYOUTS[name], arguments.rows)
            seconds[name].append(epoch.seconds)
            rows[name] = f"{epoch.steps} | {epoch.places:,} | {share:.1%}"
    print("| rows | steps | places | filled | CPU seconds | to padded |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = [ours / padded for ours, padded in zip(seconds[name], seconds[PADDED], strict=True)]
        spread = f"{min(ratios):.2f} **{statistics.median(ratios):.2f}** {max(ratios):.2f}"
        print(f"| {name} | {row} | {statistics.median(seconds[name]):.1f} | {spread} |")
    print(f"\n{machine(torch.device('cpu'))}\nload {before} before, {load()} after")


if __name__ == "__main__":
    main()
