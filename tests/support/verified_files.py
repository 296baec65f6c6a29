"""Checkpoint files of `VerifiedCheckpointIO`, runs that write them, and ways to damage them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from tests.support import toys
from tests.support.toys import Toy


def runner(folder: Path, *callbacks: Any, io: Any = None, **options: Any) -> Trainer:
    """A trainer that keeps every epoch, and the last."""
    keep = ModelCheckpoint(folder / "kept", filename="{step}", save_last=True, save_top_k=-1)
    settings = {"enable_checkpointing": True, "callbacks": [*callbacks, *([] if callbacks else [keep])]}
    return toys.trainer(folder, plugins=[VerifiedCheckpointIO() if io is None else io], **(settings | options))


def fitted(folder: Path, *callbacks: Any, ckpt_path: Path | None = None, epochs: int = 2, **options: Any) -> Trainer:
    trainer = runner(folder, *callbacks, max_epochs=epochs, **options)
    trainer.fit(Toy(), toys.loader(), ckpt_path=ckpt_path)
    return trainer


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def saved(path: Path, step: int, io: VerifiedCheckpointIO, **more: Any) -> Path:
    io.save_checkpoint({"global_step": step, "epoch": 0, "optimizer_states": [], "x": torch.ones(9)} | more, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
