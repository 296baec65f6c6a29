"""Scores a module by its loss on single rows, so that two modules can be compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_lora.errors import ConfigError, ProbeError

HeldOut = tuple[DataLoader[Any], Sequence[int]]
"""A loader, and the rows of its dataset that modules are scored on."""


def row_losses(trainer: Trainer, module: LightningModule, held_out: HeldOut, batch_rows: int) -> Tensor:
    """The loss of each row by ``predict_step``: of whole batches if it returns a loss for each row, else row by row.

    Args:
        held_out: The rows to score it on; the loader's ``collate_fn`` makes their batches.
        batch_rows: Most rows of a batch.

    Returns:
        ``(rows,)`` float64, nats.

    Raises:
        ConfigError: If ``predict_step`` returns no losses.
    """
    loader, rows = held_out
    subset = Subset(loader.dataset, rows)

    def predict(size: int) -> list[Any]:
        return trainer.predict(module, DataLoader(subset, size, collate_fn=loader.collate_fn)) or []

    losses = [_loss_of(module, predicted) for predicted in predict(batch_rows)]
    if sum(loss.numel() for loss in losses) != len(rows):
        losses = [_loss_of(module, predicted).mean() for predicted in predict(1)]
    return torch.cat([loss.reshape(-1) for loss in losses])


def check_gives_losses(module: LightningModule) -> None:
    """Raise `ConfigError` if ``module`` does not define ``predict_step``, which must return losses."""
    if type(module).predict_step is LightningModule.predict_step:
        raise _no_losses(module)


def _loss_of(module: LightningModule, predicted: Any) -> Tensor:
    loss = predicted.get("loss") if isinstance(predicted, Mapping) else None
    if not isinstance(loss, Tensor):
        raise _no_losses(module)
    return loss.detach().cpu().double()


def _no_losses(module: LightningModule) -> ConfigError:
    return ProbeError(
        f"a probe compares losses of single rows: {type(module).__name__}.predict_step must return a mapping with the "
        f'"loss" of each row in nats, a tensor of shape (rows,).'
    )
