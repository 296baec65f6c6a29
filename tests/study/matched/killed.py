"""A script that does one run of a study, slowly, so that a test can kill it in between."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from threading import Event
from typing import Any

import lightning_lora as ll
from lightning_lora.study.matched.cells import Cell, Outcome
from tests.study.matched.learner import Learner, Rows

CELL = Cell("rank 8", 1e-3, 3, "selection", "0" * 16)


class Slow(Learner):
    """Writes a line for each step that it takes."""

    step_file = Path()
    seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.seconds)
        with self.step_file.open("a") as file:
            file.write(f"{self.trainer.global_step}\n")
        return super().training_step(batch, batch_idx)


def run(folder: Path, seconds: float) -> Outcome:
    """The run, in ``folder / "run"``, with a checkpoint after every step."""
    Slow.step_file, Slow.seconds = folder / "steps.txt", seconds
    arms = {"full": {"lora": None}, "rank 8": {"lora": ll.LoRAConfig(rank=8)}}
    trainer = {"accelerator": "cpu", "max_epochs": 2}
    study = ll.Study(Slow, Rows, arms, 1e-3, out=folder / "study", trainer=trainer, checkpoint_minutes=1e-6)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    return study._run_cell(CELL, folder / "run", Event())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]), 0.05)
