"""Writes ``events.jsonl`` into the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.files.events import EVENTS_FILE, write_event
from lightning_lora.trainer_access import run_folder, shared_folder


class RunEvents:
    """Appends events to ``events.jsonl`` in the run folder, on rank 0. All ranks must construct it.

    The run folder is that of the logger, or without a logger ``default_root_dir`` or the folder of a
    ``ModelCheckpoint``, if one was given. With neither, a line says so and nothing is written: a run must not leave
    files in the working directory that nobody asked for.

    Args:
        trainer: The Trainer of the run.
        writer: The callback that writes, for the message.

    Attributes:
        folder: The run folder on rank 0; None on other ranks, and where there is none.
    """

    def __init__(self, trainer: Trainer, writer: str) -> None:
        folder = run_folder(trainer)
        # Without default_root_dir a Trainer takes the working directory.
        has_folder = bool(trainer.loggers) or shared_folder(trainer)[0] != os.getcwd()
        if not has_folder:
            rank_zero_info(f"{writer} writes no {EVENTS_FILE}: the run has no logger and no default_root_dir")
        self.folder = Path(folder) if has_folder and trainer.is_global_zero else None

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append an event of optimizer step ``step``."""
        if self.folder is not None:
            write_event(self.folder, {"event": event, "step": step, **values})
