"""Runs of a study in processes of their own: the memory of one says nothing of another, and a crash ends one run."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.cli.study.child import CONFIG, LOG, REMARK, RESULT, ChildRun, run_child, run_children
from lightning_lora.cli.study.matched_size import LORA
from lightning_lora.files.atomic import write_text
from lightning_lora.study.bank.exactness import CHANGES_BASE, TRAINS_BASE, ApartError
from lightning_lora.study.bank.groups import Job, SideBySide, side_by_side
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.options import has_option, option_of, set_option
from lightning_lora.study.matched.outcomes import outcome_from_text
from lightning_lora.study.matched.record import UNTRAINED, Phase
from lightning_lora.study.matched.run_cell import EVERY, drop_foreign_locks, remove_checkpoints
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.matched.worker import LeaseLostError, RunError

START = "spawn" if sys.platform == "win32" else "forkserver"
"""How processes begin: forked from a server that has imported everything and holds no data."""
POLL_SECONDS = 0.2
_OF_BASE = ("model.class_path", "model.init_args.model", "model.init_args.dtype", "model.init_args.quantization")


class ProcessCells:
    """Does runs of a study one by one, each in a process, or several side by side in one.

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
        process = self._context.Process(target=run_child, args=(self._begun(cell, folder),), name=cell.run)
        if self._ended(process, [lost]):
            raise LeaseLostError
        return self._result(process.exitcode, folder, cell.phase)

    def side_by_side(self) -> SideBySide | None:
        """Does several runs in one process, if the study asks for it."""
        why_apart = {arm.name: reason for arm in self.spec.arms if (reason := _why_apart(arm))}
        bases = {arm.name: [option_of(arm.config, option) for option in _OF_BASE] for arm in self.spec.arms}
        return side_by_side(self.spec, why_apart, self._group, bases)

    def _group(self, jobs: Sequence[Job]) -> tuple[list[Outcome | BaseException], list[str]]:
        runs = [self._begun(cell, folder) for cell, folder, _ in jobs]
        name = f"{len(jobs)} runs with {jobs[0][0].run}"
        process = self._context.Process(target=run_children, args=(runs, self.spec.arms_mode), name=name)
        stopped = self._ended(process, [lost for _, _, lost in jobs])
        results: list[Outcome | BaseException] = []
        for cell, folder, lost in jobs:
            try:
                if lost.is_set():
                    raise LeaseLostError
                if stopped and not (folder / RESULT).is_file():
                    raise RunError("stopped with a run whose lease was lost", is_final=False, is_busy=True)
                results.append(self._result(process.exitcode, folder, cell.phase))
            except BaseException as error:
                results.append(error)
        remark = jobs[0][1] / REMARK
        return results, [remark.read_text(encoding="utf-8")] if remark.is_file() else []

    def _begun(self, cell: Cell, folder: Path) -> ChildRun:
        for name in (RESULT, REMARK):
            (folder / name).unlink(missing_ok=True)
        drop_foreign_locks(folder)
        write_text(folder / CONFIG, yaml.safe_dump(cell_config(self.spec, cell, folder), sort_keys=False))
        return ChildRun(str(folder), cell.seed, cell.phase, self.checkpoint_seconds, self.spec.evaluations)

    @staticmethod
    def _ended(process: Any, lost: Sequence[threading.Event]) -> bool:
        """Wait for the end of a process; returns whether it was killed because a lease was lost."""
        process.start()
        try:
            while process.is_alive():
                process.join(POLL_SECONDS)
                if any(event.is_set() for event in lost):
                    process.kill()
                    process.join()
                    return True
        except (KeyboardInterrupt, SystemExit):
            _stop(process)
            raise
        return False

    @staticmethod
    def _result(code: int | None, folder: Path, phase: Phase) -> Outcome:
        if code in (130, 143) and not (folder / RESULT).is_file():
            raise SystemExit(code)  # it was told to stop, as this worker probably was
        if not (folder / RESULT).is_file():
            signalled = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            memory = "; out of memory?" if code == -signal.SIGKILL else ""
            raise RunError(f"its process ended with {signalled}{memory}, see {folder.name}/{LOG}", is_final=False)
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if "apart" in result:
            raise ApartError(result["apart"])
        if "outcome" not in result:
            raise RunError(**result)
        remove_checkpoints(folder, phase)
        return outcome_from_text(result["outcome"])


def _why_apart(arm: ArmSpec) -> str:
    """Why runs of an arm cannot share their base, as far as its config tells; "" if they can."""
    callbacks = option_of(arm.config, "trainer.callbacks") or []
    if not option_of(arm.config, LORA):
        return TRAINS_BASE
    if any(str(option_of(callback, "class_path")).endswith("MergeOnFitEnd") for callback in callbacks):
        return CHANGES_BASE
    return ""


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
