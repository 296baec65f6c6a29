"""A run without a batch: Lightning ends it as if it had trained."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.errors import DataSettingError
from lightning_lora.lightning_private import training_loaders


def refuse_no_batches(trainer: Trainer) -> None:
    """Refuse a fit whose training data made no batch, unless ``limit_train_batches=0`` asks for that.

    No hook runs between the loaders and the end of such a fit, so this is called at its end.

    Raises:
        ConfigError: If the loaders were made and have no batch.
    """
    loop = trainer.fit_loop
    if not training_loaders(trainer) or loop.max_batches != 0 or trainer.limit_train_batches == 0:
        return
    raise DataSettingError(f"there is no batch to train on: {_why(trainer.train_dataloader)}")


def _why(loader: Any) -> str:
    rows, size = _length(getattr(loader, "dataset", None)), getattr(loader, "batch_size", None)
    if not rows or not getattr(loader, "drop_last", False):
        return "the training data has no rows for this process. Check what train_dataloader reads."
    return (
        f"the training data has {rows} rows, and batch_size={size} with drop_last=True drops the last batch, which is "
        f"the only one. Set drop_last=False, or a lower batch_size."
    )


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
