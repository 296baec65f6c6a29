"""Studies whose runs train nothing: each loss is planted. As a script it is a worker of one, to be killed."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from lightning_lora.study.matched.cells import Cell, CellStatus, Outcome
from lightning_lora.study.matched.outcomes import as_losses
from lightning_lora.study.matched.planner import StudyPlan, plan_study
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.matched.store import Store
from lightning_lora.study.matched.worker import Worker

ROWS = 40
BASE_LOSS = 3.0
DATA = {"train.jsonl": "0"}


def spec(arms: tuple[str, ...] = ("full", "rank 8", "rank 1"), **settings: Any) -> StudySpec:
    rates = (1e-4, 3e-4, 9e-4)
    made = tuple(ArmSpec(name, learning_rates=rates, config={"arm": name}) for name in arms)
    return StudySpec(**({"name": "planted", "arms": made, "baseline": arms[0], "primary": arms[1]} | settings))


def planted_loss(cell: Cell, behind: float = 0.0, best: float = 4e-4) -> float:
    """A valley in the logarithm of the rate, a little noise of the seed, and ``behind`` for rank 1."""
    if cell.phase == "base":
        return BASE_LOSS
    noise = torch.Generator().manual_seed(zlib.crc32(f"{cell.arm} {cell.seed}".encode()))
    loss = 2.0 + 0.1 * math.log(cell.learning_rate / best) ** 2 + behind * (cell.arm == "rank 1")
    return loss + 0.0005 * float(torch.randn((), generator=noise))


def outcome(loss: float) -> Outcome:
    tokens = torch.arange(1, ROWS + 1)
    rows = as_losses(loss * tokens.double(), tokens, torch.arange(ROWS) % 2 == 0)
    return Outcome(10, 1000, 0.5, 2**20, 64, 256, rows)


def finished(study: StudySpec, loss_of: Any, most: int = 200) -> tuple[StudyPlan, dict[str, CellStatus]]:
    """Do what the planner asks for until it asks for nothing; ``loss_of`` gives a loss, or a reason for a failure."""
    known: dict[str, CellStatus] = {}
    for _ in range(most):
        plan = plan_study(study, known.values(), DATA)
        wanted = [cell for cell in plan.cells if cell.key not in known]
        if not wanted:
            return plan, known
        for cell in wanted:
            found = loss_of(cell)
            known[cell.key] = (
                CellStatus(cell, "failed", 1, found)
                if isinstance(found, str)
                else CellStatus(cell, "done", 1, "", outcome(found))
            )
    raise AssertionError("the planner never ends")


def main(folder: str, url: str, lease: str) -> None:
    """A worker whose runs take 30 ms, and which writes a line for each that it begins."""

    def run(cell: Cell, run_folder: Path, lost: threading.Event) -> Outcome:
        with open(Path(folder) / "begun.jsonl", "a") as file:
            file.write(json.dumps([cell.key]) + "\n")
        time.sleep(0.03)
        return outcome(planted_loss(cell))

    store = Store(url, "planted", float(lease))
    store.open({"fixed": {}, "arms": {}})
    Worker(spec(seeds=8), DATA, Path(folder), store, run).work()


if __name__ == "__main__":
    main(*sys.argv[1:])
