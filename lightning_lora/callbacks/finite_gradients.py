"""Keeps NaN and infinite gradients from the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.errors import GradientError
from lightning_lora.sharding.collectives import largest_of_ranks

from .finite import infinite_on_any_rank, local_values
from .one_reading import reading_of

_NAME = "infinite gradients"


class FiniteGradients(Callback):
    """Stops a run before the optimizer takes a NaN or infinite gradient, and names the first parameter that has one.

    Weights, optimizer state and checkpoints stay as they were after the last good step. Each optimizer step takes one
    norm over all gradients, after accumulation, averaging over ranks and unscaling, and before clipping, and waits for
    the device once, together with the other callbacks (`one_reading`). All ranks stop together.

    With ``16-mixed`` overflows are part of the method: the gradient scaler skips such a step and halves its scale. The
    run is stopped only when the scale has fallen below 1, as then it is not the scale that overflows.

    Manual optimization is covered if it steps the optimizers of ``self.optimizers()``. Steps of raw optimizers and of
    DeepSpeed cannot be seen; a warning says so.

    Raises:
        GradientError: With the names of the parameter, the optimizer step and the batches.
    """

    def __init__(self) -> None:
        self._seen = False
        self._step = -1
        self._first_batch = self._last_batch = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn under DeepSpeed, which keeps gradients to itself."""
        self._seen, self._step = False, -1
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            rank_zero_warn("FiniteGradients does nothing: DeepSpeed keeps gradients inside its engine.")
            self._seen = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the first and the last batch of the optimizer step."""
        if trainer.global_step != self._step or batch_idx == 0:
            self._step, self._first_batch = trainer.global_step, batch_idx
        self._last_batch = batch_idx

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check all gradients by one norm, and each of them only if the norm is not finite."""
        self._seen = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [local_values(p.grad) for p in parameters if p.grad is not None]
        reading = reading_of(trainer)
        reading.ask(_NAME, infinite_on_any_rank(trainer, gradients))
        if reading.take(_NAME) == [0]:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() >= 1:
            return
        names_by_id = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        order = {key: number for number, key in enumerate(names_by_id)}
        parameters.sort(key=lambda parameter: order.get(id(parameter), len(order)))
        wrong = torch.tensor(
            [p.grad is not None and not local_values(p.grad).isfinite().all() for p in parameters]
        ).int()
        names = [names_by_id.get(id(p), "(not a parameter of the module)") for p in parameters]
        # Sharded gradients differ between ranks, and all ranks must stop together.
        wrong = largest_of_ranks(trainer, wrong)
        if wrong.any():  # otherwise only the norm overflowed
            raise GradientError(self._message(trainer, [name for name, bad in zip(names, wrong, strict=True) if bad]))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if no optimizer step was seen; a run that is continued at the end of an epoch has none in it."""
        if not self._seen and self._step >= 0:
            rank_zero_warn(
                "FiniteGradients saw no optimizer step in this epoch: with manual optimization, step the optimizers "
                "that self.optimizers() returns."
            )
            self._seen = True

    def _message(self, trainer: Trainer, names: list[str]) -> str:
        one = self._first_batch == self._last_batch
        batches = f"batch {self._last_batch}" if one else f"batches {self._first_batch} to {self._last_batch}"
        others = f" (and of {len(names) - 1} other parameters)" if len(names) > 1 else ""
        clip = "" if trainer.gradient_clip_val else ", set trainer.gradient_clip_val"
        return (
            f"the gradient of {names[0]!r}{others} is NaN or infinite in optimizer step {trainer.global_step + 1}, "
            f"made of {batches} of epoch {trainer.current_epoch}. The optimizer has not taken it: weights and "
            f"checkpoints are those of step {trainer.global_step}. Check these batches{clip} or lower the learning "
            f"rate; trainer.detect_anomaly=true shows the operation that the gradient comes from."
        )
