"""One run of a study in a process of its own, or several side by side: by the code of ``fit``, and then scored."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lightning_lora.cli.lora_cli import LoRACLI
from lightning_lora.cli.parser import restrict_imports
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.files.atomic import write_text
from lightning_lora.study.bank.bank import Arm, ArmBank
from lightning_lora.study.bank.exactness import ApartError
from lightning_lora.study.matched.outcomes import outcome_to_text
from lightning_lora.study.matched.recorder import CellRecorder
from lightning_lora.study.matched.run_cell import as_run_error, cell_callbacks, fit_and_score, share_of_run
from lightning_lora.study.tasks.kept_models import keep_model
from lightning_lora.study.tasks.settings import KEEP_VARIABLE

CONFIG, LOG, RESULT, REMARK = "cell.yaml", "log.txt", "result.json", "remark.txt"


class CellCLI(LoRACLI):
    """``fit`` of one run of a study.

    Args:
        folder: The run folder.
        seed: Seed of the run.
        phase: What the run is for.
        every: Time between two checkpoints.
        evaluations: See `CellRecorder`.
        place: Its place among runs side by side; None: it has the process for itself.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        phase: Any,
        every: timedelta,
        evaluations: float | None,
        place: Arm | None = None,
    ) -> None:
        self._folder, self._seed, self._phase, self._every = folder, seed, phase, every
        self._evaluations, self._place = evaluations, place
        super().__init__()

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        clock = time.perf_counter if self._place is None else self._place.seconds
        share = share_of_run(self._phase)
        recorder = CellRecorder(self._folder, self._seed, None, self._evaluations, share, clock)
        more = [*cell_callbacks(self._folder, recorder, self._every), *([self._place.callback] if self._place else [])]
        return super()._instantiate_trainer(config, [*callbacks, *more])

    def fit(self, **_: Any) -> None:
        """Train and score, in the place of the Trainer's ``fit``."""
        self.outcome = fit_and_score(self.trainer, self.model, self.datamodule, self._folder, self._phase)
        if self._phase == "verdict" and os.environ.get(KEEP_VARIABLE):
            keep_model(self.model, self._folder)


@dataclass(frozen=True)
class ChildRun:
    """A run for a process of its own, or one that it shares with other runs.

    Args:
        folder: The run folder, which holds ``cell.yaml``.
        seed: Seed of the run.
        phase: What it is for.
        checkpoint_seconds: Time between two checkpoints.
        evaluations: See `CellRecorder`.
    """

    folder: str
    seed: int
    phase: str
    checkpoint_seconds: float
    evaluations: float | None

    def do(self, place: Arm | None = None) -> None:
        """Do the run; ``result.json`` says what came out."""
        folder, every = Path(self.folder), timedelta(seconds=self.checkpoint_seconds)
        sys.argv = ["lightning-lora", "fit", f"--config={folder / CONFIG}"]
        try:
            cli = CellCLI(folder, self.seed, self.phase, every, self.evaluations, place)
            # The peak of a process tells nothing of one run in it.
            outcome = cli.outcome if place is None else replace(cli.outcome, peak_bytes=None)
            result = {"outcome": outcome_to_text(outcome)}
        except ApartError as error:
            result = {"apart": error.reason}
        except Exception as error:
            traceback.print_exc()
            failure = as_run_error(error)
            result = {"reason": failure.reason, "is_final": failure.is_final, "is_busy": failure.is_busy}
        except SystemExit as exit:
            if exit.code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
                raise
            result = {"reason": f"fit refused its config, see {LOG}", "is_final": True}
        write_text(folder / RESULT, json.dumps(result))


def run_child(run: ChildRun) -> None:
    """Do a run in this process."""
    _prepare([run])
    run.do()


def run_children(runs: Sequence[ChildRun], mode: str) -> None:
    """Do runs side by side in this process.

    Args:
        runs: The runs.
        mode: ``turns`` or ``rows``.
    """
    _prepare(runs)
    signal.signal(signal.SIGTERM, _stop)
    bank = ArmBank(mode)  # pyright: ignore[reportArgumentType]
    bank.run({run.folder: run.do for run in runs})
    if bank.remark:
        write_text(Path(runs[0].folder, REMARK), bank.remark)


def _prepare(runs: Sequence[ChildRun]) -> None:
    _end_with_parent()
    first = Path(runs[0].folder)
    for run in runs[1:]:
        with Path(run.folder, LOG).open("a", encoding="utf-8") as file:
            file.write(f"side by side with {first.name}, whose {LOG} tells of this run, too\n")
    _log_to(first / LOG)
    quiet_libraries()
    restrict_imports()


def _stop(signum: int, frame: object) -> None:
    """Let each run finish its step and save its state; signals reach the main thread only, where none of them runs."""
    raise SystemExit(128 + signum)


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
