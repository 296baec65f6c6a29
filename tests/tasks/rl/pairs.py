"""Pairs of random tokens, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support import toys
from tests.support.tiny_models import VOCAB, llama, llama_config

PAD = 0
LONGEST = 14


def pair(seed: int) -> dict[str, Tensor]:
    """Both rows of a pair: a prompt of 4 tokens, answers of different lengths, padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, LONGEST), generator=generator)
    ids[1, :4] = ids[0, :4]
    lengths = 6 + torch.randint(LONGEST - 5, (2, 1), generator=generator)
    mask = (torch.arange(LONGEST) < lengths).long()
    ids = ids.where(mask.bool(), PAD)
    labels = ids.where(mask.bool() & (torch.arange(LONGEST) >= 4), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(batch_size: int = 4, count: int = 12, **columns: Any) -> Any:
    """Pairs in batches; each of ``columns`` has a value for each pair."""
    extra = [{name: torch.tensor(values[number]) for name, values in columns.items()} for number in range(count)]
    return DataLoader([pair(number) | extra[number] for number in range(count)], batch_size=batch_size)  # type: ignore


def folder_of_llama(folder: Path, **settings: Any) -> str:
    llama(**settings).save_pretrained(folder / "llama")
    return str(folder / "llama")


def fit(module: LightningModule, folder: Path, train: Any, validation: Any = None, **options: Any) -> Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    runner = toys.trainer(folder, **options)
    runner.fit(module, train, validation, ckpt_path=ckpt_path, weights_only=True)
    return runner


def started(module: LightningModule, folder: Path) -> LightningModule:
    """A module as a fit has it when it begins."""
    toys.trainer(folder, limit_train_batches=0, limit_val_batches=0).fit(module, loader())
    return module


__all__ = ["LONGEST", "PAD", "VOCAB", "fit", "folder_of_llama", "llama_config", "loader", "pair", "started"]
