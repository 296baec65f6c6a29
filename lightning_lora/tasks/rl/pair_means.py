"""Weighted means over pairs: what a task logs of them, in training and in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.batch.token_loss import one_if_zero
from lightning_lora.callbacks.progress import needs_metric
from lightning_lora.tasks.head_chunks import at_least_float32
from lightning_lora.tasks.running_mean import RunningMean


def weights_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The weight of each pair of a batch, ``(pairs,)``; 1 if the batch has none."""
    ids = batch["input_ids"]
    # The precision bf16-true converts every number of a batch; sums would lose digits.
    return at_least_float32(batch["weights"]) if "weights" in batch else torch.ones(len(ids), device=ids.device)


def log_pairs(task: LightningModule, values: Mapping[str, Tensor], weights: Tensor) -> None:
    """Log the weighted means of a training batch as ``train_loss`` and so on.

    Args:
        task: The task in its ``training_step``.
        values: A number for each pair by name, ``(pairs,)`` each.
        weights: ``(pairs,)``.
    """
    for name, numbers in values.items():
        mean = (numbers.detach() * weights).sum() / one_if_zero(weights.sum())
        prog_bar = needs_metric(task._trainer, f"train_{name}")
        task.log(f"train_{name}", mean, prog_bar=prog_bar, batch_size=len(weights))


def add_pairs(means: Mapping[str, RunningMean], values: Mapping[str, Tensor], weights: Tensor) -> None:
    """Add the pairs of a batch to the weighted means of an evaluation; the arguments are those of `log_pairs`.

    Args:
        means: A running mean by name.
        values: A number for each pair by the same names.
        weights: ``(pairs,)``.
    """
    for name, mean in means.items():
        mean.update(values[name] * weights, weights.sum())
