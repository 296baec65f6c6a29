"""Checkpoints of toy runs, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from tests.support.toys import Toy, fit


def without_lora() -> LightningModule:
    """A toy for full fine-tuning."""
    module = Toy()
    module.lora = None
    return module


def saved(folder: Path, module: LightningModule | None = None, **options: Any) -> Path:
    """Train ``module``, or a new toy, and save a checkpoint in ``folder``."""
    path = folder / "a.ckpt"
    fit(Toy() if module is None else module, folder, **options).save_checkpoint(path)
    return path


def content(path: Path) -> dict[str, Any]:
    """Load a checkpoint without unpickling it."""
    return torch.load(path, weights_only=True)
