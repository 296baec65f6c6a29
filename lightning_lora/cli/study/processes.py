"""Runs of a study in processes of their own: the memory of one says nothing of another, and a crash ends one run."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.cli.study.child import CONFIG, LOG, RESULT, run_child
from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.options import has_option, set_option
from lightning_lora.study.matched.outcomes import outcome_from_text
from lightning_lora.study.matched.record import UNTRAINED
from lightning_lora.study.matched.run_cell import EVERY, drop_foreign_locks, remove_checkpoints
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.matched.worker import LeaseLostError, RunError

START = "spawn" if sys.platform == "win32" else "forkserver"
"""How processes begin: forked from a server that has imported everything and holds no data."""
POLL_SECONDS = 0.2


class ProcessCells:
    """Does runs of a study one by one, each in a process.

    Args:
        spec: The study, with all configs.
        checkpoint_seconds: Time between two checkpoints of a run.
    """

    def __init__(self, spec: StudySpec, checkpoint_seconds: float = EVERY.total_seconds()) -> None:
        self.spec = spec
        self.checkpoint_seconds = checkpoint_seconds
        self._context: Any = multiprocessing.get_context(START)
        if START == "forkserver":
            self._context.set_forkserver_preload(["lightning_lora.cli.study.child"])

    def __call__(self, cell: Cell, folder: Path, lost: threading.Event) -> Outcome:
        """Do a run, and stop it when the lease is lost or this worker is told to stop."""
        (folder / RESULT).unlink(missing_ok=True)
        drop_foreign_locks(folder)
        with atomic_file(folder / CONFIG) as file:
            file.write(yaml.safe_dump(cell_config(self.spec, cell, folder), sort_keys=False).encode())
        arguments = (str(folder), cell.seed, cell.phase, self.checkpoint_seconds, self.spec.evaluations)
        process = self._context.Process(target=run_child, args=arguments, name=cell.run)
        process.start()
        try:
            while process.is_alive():
                process.join(POLL_SECONDS)
                if lost.is_set():
                    process.kill()
                    process.join()
                    raise LeaseLostError
        except (KeyboardInterrupt, SystemExit):
            _stop(process)
            raise
        return self._result(process.exitcode, folder)

    @staticmethod
    def _result(code: int | None, folder: Path) -> Outcome:
        if code in (130, 143):
            raise SystemExit(code)  # it was told to stop, as this worker probably was
        if not (folder / RESULT).is_file():
            signalled = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            memory = "; out of memory?" if code == -signal.SIGKILL else ""
            raise RunError(f"its process ended with {signalled}{memory}, see {folder.name}/{LOG}", is_final=False)
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if "outcome" not in result:
            raise RunError(**result)
        remove_checkpoints(folder)
        return outcome_from_text(result["outcome"])


def cell_config(spec: StudySpec, cell: Cell, folder: Path) -> Mapping[str, Any]:
    """The config of ``fit`` for one run: that of its arm, with its rate, its seed and its folder."""
    arm = spec.arm(spec.baseline if cell.arm == UNTRAINED else cell.arm)
    config = copy.deepcopy(dict(arm.config))
    if cell.learning_rate:
        set_option(config, spec.learning_rate_option, cell.learning_rate)
    config["seed_everything"] = cell.seed
    data = "data.init_args.seed"
    # With `validation_share` this seed chooses the held-out rows, which are the same in all runs.
    if has_option(config, data) and (config["data"]["init_args"] or {}).get("validation_share") is None:
        set_option(config, data, cell.seed)
    logger = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    config["trainer"] = dict(config.get("trainer") or {}) | {
        "devices": 1,
        "num_nodes": 1,
        "default_root_dir": str(folder),
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
        "enable_checkpointing": True,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    config["ckpt_path"] = None
    return config


def _stop(process: Any) -> None:
    """Let a run finish its step and save its state."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGTERM)
    process.join()
