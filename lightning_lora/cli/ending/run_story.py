"""What a run says of itself in ``events.jsonl``, when it starts and when it ends, and what its losses have cost."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor

from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.files.atomic import sha256
from lightning_lora.files.events import write_event
from lightning_lora.lora.reports import count_parameters
from lightning_lora.study.report.runs.losses import LossCurve
from lightning_lora.this_command import program
from lightning_lora.trainer_access import found
from lightning_lora.versions import installed_version

_LARGEST_HASHED = 2**28
"""Bytes of a data file above which its hash would delay the start; its size is recorded then."""
_LIBRARIES = ("lightning-lora", "torch", "lightning", "transformers", "datasets", "numpy")
_STOPS = (KeyboardInterrupt, SystemExit, SIGTERMException)


class Effort:
    """Supervised tokens and seconds of training, validation left out, by optimizer step.

    Args:
        earlier: Tokens and seconds of the part of the run that this one continues.
    """

    def __init__(self, earlier: tuple[int, float] = (0, 0.0)) -> None:
        self._tokens: Tensor | int = earlier[0]
        self._seconds = earlier[1]
        self._since: float | None = time.perf_counter()
        self._waiting: list[tuple[int, Tensor | int, float]] = []

    def add(self, batch: Any) -> None:
        """Count a batch; a count on a GPU stays there."""
        tokens = count_supervised(batch)
        self._tokens = self._tokens + (count_rows(batch) if tokens is None else tokens)

    def mark(self, step: int) -> None:
        """Remember what was spent up to an optimizer step."""
        self._waiting.append((step, self._tokens, self._clock()))

    def pause(self) -> None:
        """Stop the clock."""
        self._seconds, self._since = self._clock(), None

    def resume(self) -> None:
        """Let the clock run again."""
        self._since = time.perf_counter()

    def move_to(self, curve: LossCurve) -> None:
        """Add what was remembered to a curve."""
        curve.effort |= {step: (int(tokens), seconds) for step, tokens, seconds in self._waiting}
        self._waiting = []

    def _clock(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def tell_start(folder: Path, trainer: Trainer, module: LightningModule) -> None:
    """Write the event ``started``: command, versions, device, data."""
    event = {
        "event": "started",
        "step": trainer.global_step,
        "steps_planned": _planned_steps(trainer),
        "command": [program(), *sys.argv[1:]],
        "versions": {name: installed_version(name) for name in _LIBRARIES},
        "device": _device(module),
        "processes": trainer.world_size,
        "data": _data(trainer),
    }
    if trainer.world_size == 1:  # counting shards takes all processes
        event["trained_parameters"] = count_parameters(module).trainable
    write_event(folder, event)


def tell_end(folder: Path, step: int, exception: BaseException | None) -> None:
    """Write the event ``ended``: done, stopped, or failed with the first line of the error."""
    event: dict[str, Any] = {"event": "ended", "step": step, "how": "done"}
    if exception is not None:
        event["how"] = "stopped" if isinstance(exception, _STOPS) else "failed"
    if event["how"] == "failed":
        first = next(iter(str(exception).strip().splitlines()), "")
        event["reason"] = f"{type(exception).__name__}: {first}" if first else type(exception).__name__
    write_event(folder, event)


def _planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end, or another accumulation in each epoch."""
    try:
        planned = trainer.estimated_stepping_batches
    except MisconfigurationException:
        return None
    return int(planned) if math.isfinite(planned) else None


def _device(module: LightningModule) -> str:
    if module.device.type == "cuda":
        return torch.cuda.get_device_name(module.device)
    return f"{module.device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _data(trainer: Trainer) -> dict[str, str]:
    """Data files that the config names, to their hashes; only their sizes where they are large."""
    saver = found(trainer, SaveConfigCallback)
    config = saver.config.get("data") if saver else None
    settings = (config or {}).get("init_args") or {}
    found_files: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        files = settings.get(name)
        for file in files if isinstance(files, list) else [files]:
            if isinstance(file, str) and Path(file).is_file():
                found_files[file] = _print_of(Path(file))
    return found_files


def _print_of(file: Path) -> str:
    size = file.stat().st_size
    return f"sha256 {sha256(file)}" if size <= _LARGEST_HASHED else f"{size:,} bytes, not hashed"
