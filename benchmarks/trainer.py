"""The same step inside a Lightning Trainer: `LoRAMixin` against PEFT in a LightningModule, and what the Trainer adds.

    python -m benchmarks.trainer --workload llama-28m --threads 2 --out runs/benchmarks

Every repetition gives each contender, in an order drawn anew, one short ``fit`` without logger and checkpoints, and as
many steps of the bare loop of ``benchmarks.step``. A step lasts from the start of a batch to the start of the next.
Writes ``<workload>-trainer.json`` and ``.md`` and prints the Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.adapters import Adapter
from benchmarks.contenders import (
    FULL,
    LEARNING_RATE,
    OURS,
    PEFT,
    Trainee,
    full_fine_tuning,
    fused_adamw,
    ours,
    peft_lora,
)
from benchmarks.machine import QUIET, disturbed, load, machine
from benchmarks.setting import Setting, fresh_copy, prepared
from benchmarks.timing import Spread, interleave, paired_ratio, spread, train_step
from benchmarks.workloads import WORKLOADS, Batch, next_token_loss
from lightning_lora import LoRAMixin, load_lora_state_dict


class Plain(LightningModule):
    """A LightningModule around a model that is ready to train, as users of PEFT write it."""

    def __init__(self, trainee: Trainee) -> None:
        super().__init__()
        self.model = trainee.model
        self._optimizer = trainee.optimizer

    def training_step(self, batch: Batch) -> Tensor:
        return next_token_loss(self.model, batch)

    def configure_optimizers(self) -> Optimizer:
        assert self._optimizer is not None
        return self._optimizer


class Ours(LoRAMixin, LightningModule):
    """The same with `LoRAMixin`, which injects the adapters itself."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__(lora=adapter.config, lora_root="model")
        self.model = model
        self._adapter = adapter

    def configure_model(self) -> None:
        self.apply_lora()
        load_lora_state_dict(self.model, self._adapter.factors)

    def training_step(self, batch: Batch) -> Tensor:
        return next_token_loss(self.model, batch)

    def configure_optimizers(self) -> Optimizer:
        return fused_adamw(self.lora_parameter_groups(LEARNING_RATE))


class BatchStarts(Callback):
    """Moments at which batches started, seconds."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())


def seconds_in_trainer(module: LightningModule, batch: Batch, steps: int) -> float:
    """Median seconds of a step of one ``fit``; its first step is left out."""
    starts = BatchStarts()
    trainer = Trainer(
        accelerator="gpu" if batch.input_ids.is_cuda else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[starts],
        **QUIET,
    )
    batches: Any = [batch] * (steps + 2)
    with warnings.catch_warnings():
        # One batch in memory needs no worker processes.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, DataLoader(batches, batch_size=None))
    moments = starts.moments[1:]
    return statistics.median(b - a for a, b in itertools.pairwise(moments))


def seconds_bare(trainee: Trainee, batch: Batch, steps: int) -> float:
    """Median seconds of a step of the bare loop; its first step is left out."""
    return statistics.median([train_step(trainee, batch).step for _ in range(steps + 1)][1:])


def entrants(setting: Setting, steps: int) -> dict[str, Callable[[], float]]:
    """Contender, in the Trainer and bare, to what measures it once."""
    base, adapter, batch = setting
    ours_module = Ours(fresh_copy(base, own_weights=False), adapter)
    peft_module = Plain(peft_lora(fresh_copy(base, own_weights=False), adapter))
    full_module = Plain(full_fine_tuning(fresh_copy(base, own_weights=True), adapter))
    bare = {
        OURS: ours(fresh_copy(base, own_weights=False), adapter),
        PEFT: peft_lora(fresh_copy(base, own_weights=False), adapter),
        FULL: full_fine_tuning(fresh_copy(base, own_weights=True), adapter),
    }
    modules = {OURS: ours_module, PEFT: peft_module, FULL: full_module}
    found: dict[str, Callable[[], float]] = {}
    for name, module in modules.items():
        found[f"{name}, Trainer"] = lambda module=module: seconds_in_trainer(module, batch, steps)
        found[f"{name}, bare"] = lambda trainee=bare[name]: seconds_bare(trainee, batch, steps)
    return found


def as_markdown(title: str, seconds: dict[str, list[float]]) -> str:
    """A row for each contender: in the Trainer, bare, the difference, and against PEFT in the Trainer."""
    rows = [
        f"## {title}, in a Trainer",
        "",
        f"| | step in the Trainer, ms | bare, ms | Trainer adds, ms | step / {PEFT} in a LightningModule |",
        "|---|---|---|---|---|",
    ]
    for name in (FULL, PEFT, OURS):
        inside, bare = seconds[f"{name}, Trainer"], seconds[f"{name}, bare"]
        added = spread([a - b for a, b in zip(inside, bare, strict=True)])
        ratio = paired_ratio(inside, seconds[f"{PEFT}, Trainer"])
        times = f"{statistics.median(inside) * 1e3:.1f} | {statistics.median(bare) * 1e3:.1f}"
        rows.append(f"| {name} | {times} | {_spread(added, 1e3, 1)} | {_spread(ratio, 1, 3)} |")
    return "\n".join([*rows, "", "Medians over repetitions [10th, 90th percentile], paired within each.", ""])


def _spread(value: Spread, factor: float, digits: int) -> str:
    median, low, high = (f"{x * factor:.{digits}f}" for x in (value.median, value.p10, value.p90))
    return f"{median} [{low}, {high}]"


def run(name: str, repetitions: int, steps: int, device: torch.device, rank: int, folder: Path) -> str:
    """Run one workload and write its report; returns the Markdown."""
    before, workload = load(), WORKLOADS[name]
    with prepared(workload, rank, device) as setting:
        seconds = interleave(entrants(setting, steps), repetitions, warmups=1)
    after = load()
    about = {
        "workload": name,
        "settings": {"repetitions": repetitions, "steps": steps, "rank": rank},
        "machine": machine(device),
        "load": {"before": before, "after": after, "disturbed": disturbed(before, after)},
        "seconds": seconds,
    }
    markdown = as_markdown(f"{name}: {workload.about}", seconds)
    if about["load"]["disturbed"]:
        markdown += f"\n**The load exceeded the cores ({before:.1f} before, {after:.1f} after): unreliable.**\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-trainer.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / f"{name}-trainer.md").write_text(markdown)
    return markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="llama-28m", choices=WORKLOADS)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each fit and of each bare loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    settings = arguments.repetitions, arguments.steps, arguments.device, arguments.rank
    print(run(arguments.workload, *settings, arguments.out))


if __name__ == "__main__":
    main()
