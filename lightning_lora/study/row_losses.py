"""The loss of single rows, by which two modules are compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_lora.errors import ConfigError


def row_losses(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], rows: Sequence[int], batch_rows: int
) -> Tensor:
    """What ``predict_step`` gives: a batch at a time if it has a loss for each row, else row by row.

    Args:
        trainer: Predicts; its precision and device are used.
        module: Whose losses.
        loader: Rows are taken of its dataset, and made batches by its ``collate_fn``.
        rows: Of the dataset.
        batch_rows: Rows of a batch at most.

    Returns:
        ``(rows,)`` float64, nats.

    Raises:
        ConfigError: If it gives no losses.
    """
    subset = Subset(loader.dataset, rows)

    def predict(size: int) -> list[Any]:
        return trainer.predict(module, DataLoader(subset, size, collate_fn=loader.collate_fn)) or []

    losses = [_loss_of(module, predicted) for predicted in predict(batch_rows)]
    if sum(loss.numel() for loss in losses) != len(rows):
        losses = [_loss_of(module, predicted).mean() for predicted in predict(1)]
    return torch.cat([loss.detach().double().cpu().reshape(-1) for loss in losses])


def _loss_of(module: LightningModule, predicted: Any) -> Tensor:
    loss = predicted.get("loss") if isinstance(predicted, Mapping) else None
    if not isinstance(loss, Tensor):
        raise _no_losses(module)
    return loss


def check_gives_losses(module: LightningModule) -> None:
    """Raise `ConfigError` if ``module`` has no ``predict_step`` of its own, which would give losses of rows."""
    if type(module).predict_step is LightningModule.predict_step:
        raise _no_losses(module)


def _no_losses(module: LightningModule) -> ConfigError:
    return ConfigError(
        f"a probe compares losses of single rows: let {type(module).__name__}.predict_step return a mapping with their "
        f'"loss" in nats, a tensor of shape (rows,).'
    )
