"""Evaluations on a log-spaced grid of steps, beside the training, which goes on as if nothing had been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.capacity.fixed_rows import fixed_batches, validation_loaders
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import DataError, ResultFileError
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.study.statistics.steps_to_loss import evaluation_steps


class Evaluations:
    """Scores the held-out rows of a run after some of its steps, by ``predict_step``.

    Callbacks see none of it, nothing is logged, and random numbers and modes of layers are as before.

    Args:
        factor: Each step is at most this many times the one before, or one more.

    Raises:
        DataError: If the number of steps is not known, rows cannot be chosen, or ``predict_step`` gives no losses.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, factor: float) -> None:
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ResultFileError(
                "evaluations on a grid need runs with a known number of steps: set trainer.max_steps."
            )
        self.steps = frozenset(evaluation_steps(int(steps), factor))
        if type(module).predict_step is LightningModule.predict_step:
            raise _no_losses(module)
        loaders = validation_loaders(trainer)
        loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        count = len(loader.dataset) if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__") else 0  # pyright: ignore[reportArgumentType]
        batches = fixed_batches(loader, count, trainer.strategy.root_device) if count else None
        if batches is None:
            raise ResultFileError("evaluations on a grid need a validation set that has a length.")
        self._batches = batches

    def loss(self, trainer: Trainer, module: LightningModule) -> float:
        """The mean loss over all held-out rows, nats per supervised token."""
        device = trainer.strategy.root_device
        with (
            kept_random_state(device),
            in_eval_mode(module),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            found = [
                _sums(module, module.predict_step(trainer.strategy.batch_to_device(batch, dataloader_idx=0), place))
                for place, batch in enumerate(self._batches)
            ]
        return sum(loss for loss, _ in found) / sum(count for _, count in found)


def _sums(module: LightningModule, found: Any) -> tuple[float, float]:
    """Sum of the losses of a batch over its tokens, and the number of them."""
    given = batch_losses(found)
    if given is None:
        raise _no_losses(module)
    losses, tokens = given
    weights = torch.ones_like(losses) if tokens is None else tokens.double()
    return float((losses * weights).sum()), float(weights.sum())


def _no_losses(module: LightningModule) -> DataError:
    return ResultFileError(
        f"evaluations on a grid need losses of rows: {type(module).__name__}.predict_step must return a mapping with "
        f"the 'loss' of each row."
    )


def batch_losses(found: Any) -> tuple[Tensor, Tensor | None] | None:
    """What `predict_step` says of a batch: the mean loss of each row, and their tokens.

    Returns:
        ``(rows,)`` losses in float64, and ``(rows,)`` numbers of tokens, None where it names none; None if it gives no
        losses.
    """
    if not isinstance(found, Mapping) or not isinstance(found.get("loss"), Tensor):
        return None
    tokens = found.get("tokens")
    losses = found["loss"].detach().double().reshape(-1)
    return losses, tokens.detach().reshape(-1) if isinstance(tokens, Tensor) else None
