"""One run of a study in a process of its own: by the code of ``fit``, and then scored."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lightning_lora.cli.lora_cli import LoRACLI, restrict_imports
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.matched.outcomes import outcome_to_text
from lightning_lora.study.matched.recorder import CellRecorder
from lightning_lora.study.matched.run_cell import as_run_error, cell_callbacks, fit_and_score

CONFIG, LOG, RESULT = "cell.yaml", "log.txt", "result.json"


class CellCLI(LoRACLI):
    """``fit`` of one run of a study.

    Args:
        folder: The run folder.
        seed: Seed of the run.
        phase: What the run is for.
        every: Time between two checkpoints.
        evaluations: See `CellRecorder`.
    """

    def __init__(self, folder: Path, seed: int, phase: Any, every: timedelta, evaluations: float | None) -> None:
        self._folder, self._seed, self._phase, self._every = folder, seed, phase, every
        self._evaluations = evaluations
        super().__init__()

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        recorder = CellRecorder(self._folder, self._seed, evaluations=self._evaluations)
        return super()._instantiate_trainer(config, [*callbacks, *cell_callbacks(self._folder, recorder, self._every)])

    def fit(self, **_: Any) -> None:
        """Train and score, in the place of the Trainer's ``fit``."""
        self.outcome = fit_and_score(self.trainer, self.model, self.datamodule, self._folder, self._phase)


def run_child(folder: str, seed: int, phase: str, checkpoint_seconds: float, evaluations: float | None) -> None:
    """Do a run; ``result.json`` says what came out.

    Args:
        folder: The run folder, which holds ``cell.yaml``.
        seed: Seed of the run.
        phase: What it is for.
        checkpoint_seconds: Time between two checkpoints.
        evaluations: See `CellRecorder`.
    """
    _end_with_parent()
    place = Path(folder)
    _log_to(place / LOG)
    quiet_libraries()
    restrict_imports()
    sys.argv = ["lightning-lora", "fit", f"--config={place / CONFIG}"]
    try:
        cli = CellCLI(place, seed, phase, timedelta(seconds=checkpoint_seconds), evaluations)
        result = {"outcome": outcome_to_text(cli.outcome)}
    except Exception as error:
        traceback.print_exc()
        failure = as_run_error(error)
        result = {"reason": failure.reason, "is_final": failure.is_final, "is_busy": failure.is_busy}
    except SystemExit as exit:
        if exit.code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            raise
        result = {"reason": f"fit refused its config, see {LOG}", "is_final": True}
    with atomic_file(place / RESULT) as file:
        file.write(json.dumps(result).encode())


def _log_to(path: Path) -> None:
    """Let all output of this process, and of those that it starts, go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _end_with_parent() -> None:
    """End this process as soon as the worker is gone: another worker will do the run."""
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)

    threading.Thread(target=wait, name="parent", daemon=True).start()
