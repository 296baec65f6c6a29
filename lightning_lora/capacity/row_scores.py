"""Losses of a module on fixed batches, between two steps of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.batch.trial_step import on_device, training_loss
from lightning_lora.errors import MeasurementError


@dataclass(frozen=True)
class Scores:
    """Losses of rows, or of batches where a module tells no more.

    Args:
        losses: ``(n,)`` float64, mean loss of each row or batch, nats.
        weights: ``(n,)`` float64, supervised tokens of each, or rows where there are no tokens.
    """

    losses: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """Mean loss over all supervised tokens, or rows."""
        return float((self.losses * self.weights).sum() / self.weights.sum())

    def error_above(self, other: Scores) -> float:
        """Standard error of the mean of ``self - other``, two scores of the same rows."""
        differences, shares = self.losses - other.losses, self.weights / self.weights.sum()
        spread = differences - (differences * shares).sum()
        count = len(shares)
        return (
            float((shares.square() * spread.square()).sum().sqrt()) * math.sqrt(count / (count - 1))
            if count > 1
            else math.inf
        )


class RowScorer:
    """Scores a module by ``predict_step`` if that returns a mapping with a ``"loss"``, else by ``training_step``.

    A ``predict_step`` that is made for other batches, and fails on this one, is left out; one line says so.

    Args:
        module: The module, in evaluation mode and within `observed`.
        batch: A batch to try; a single one.

    Raises:
        ConfigError: If neither gives a loss.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        self.trainer, self.module = trainer, module
        batch = on_device(trainer, batch)
        is_overridden = type(module).predict_step is not LightningModule.predict_step
        self._predicts = is_overridden and self._can_predict(batch)
        if self._predicts:
            return
        if not module.automatic_optimization:
            raise MeasurementError(
                f"{type(module).__name__} steps its optimizers itself, and its predict_step returns no mapping with "
                f'the "loss" of each row.'
            )
        with torch.no_grad():
            self._trained(batch)

    @torch.no_grad()
    def scores(self, batches: Sequence[Any]) -> Scores:
        """Score the module as it is now on ``batches``, as a loader makes them."""
        losses, weights = [], []
        for batch in batches:
            batch = on_device(self.trainer, batch)
            found = self._predicted(batch) if self._predicts else self._trained(batch)
            assert found is not None
            losses.append(found[0])
            weights.append(found[1])
        return Scores(torch.cat(losses), torch.cat(weights))

    def _can_predict(self, batch: Any) -> bool:
        try:
            return self._predicted(batch) is not None
        except Exception as reason:  # whatever the module of a user raises
            rank_zero_info(
                f"losses are those of training_step: {type(self.module).__name__}.predict_step takes no such batch "
                f"({type(reason).__name__}: {reason})"
            )
            return False

    def _predicted(self, batch: Any) -> tuple[Tensor, Tensor] | None:
        with torch.no_grad():
            found = predicted_losses(self.trainer, self.module, batch)
        return None if found is None else (found[0].double().cpu(), found[1].double().cpu())

    def _trained(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, weight = mean_training_loss(self.trainer, self.module, batch)
        return loss.detach().double().cpu().reshape(1), weight.double().cpu().reshape(1)


def predicted_losses(trainer: Trainer, module: LightningModule, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Losses of rows by ``predict_step``, differentiable if it is, and the tokens of each, both ``(n,)``.

    The batch is one on the device.

    Returns:
        None if it returns no losses. Without tokens, rows stand for them.
    """
    with trainer.precision_plugin.predict_step_context():
        found = module.predict_step(batch, 0)
    loss = found.get("loss") if isinstance(found, Mapping) else None
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        return None
    losses, tokens = loss.reshape(-1), found.get("tokens") if isinstance(found, Mapping) else None
    if isinstance(tokens, Tensor) and tokens.numel() == losses.numel():
        return losses, tokens.detach().reshape(-1)
    return losses, torch.full_like(losses, count_rows(batch) / len(losses)).detach()


def mean_training_loss(trainer: Trainer, module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean training loss of a batch on the device, differentiable, and the tokens or rows that it is a mean of.

    Raises:
        ConfigError: If ``training_step`` returns no loss.
    """
    loss = training_loss(trainer, module, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise MeasurementError(f"{type(module).__name__}.training_step returned no loss for a batch.")
    if isinstance(module, TokenWeightedLoss):
        return module.mean_of_micro_batch(loss)
    tokens = count_supervised(batch)
    if not isinstance(tokens, Tensor):
        tokens = torch.tensor(float(count_rows(batch) if tokens is None else tokens))
    return loss, tokens
