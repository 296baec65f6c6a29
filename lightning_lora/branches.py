"""Short runs from one snapshot of a module in training, which itself is not touched.

A branch trains a copy: of what is trained, with what it needs of the optimizer; frozen weights are shared. So weights,
optimizer, random numbers and the place in the data of the run that is branched from stay as they are by construction.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_lora.errors import ConfigError


class Branch:
    """What a short run starts from.

    Args:
        module: In training or loaded from a checkpoint; not changed.
        optimizer_state: ``state_dict()`` of its optimizer; None starts afresh.
        loader: Rows are taken from its dataset and made batches by its ``collate_fn``.
        trainer_options: Of the Trainer of each run, such as ``precision`` and ``gradient_clip_val``.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizer_state: dict[str, Any] | None,
        loader: DataLoader[Any],
        trainer_options: dict[str, Any],
    ) -> None:
        self.module = module
        self.optimizer_state = copy.deepcopy(optimizer_state)
        self.loader = loader
        self.trainer_options = trainer_options

    def train(
        self, rows: Sequence[int], batch_rows: int, micro_batch: int, rate_factor: float, cooldown: float
    ) -> LightningModule:
        """A copy of the module, trained on ``rows`` in their order, once.

        Args:
            rows: Indices into the dataset.
            batch_rows: Rows of an optimizer step.
            micro_batch: Rows of a batch at most.
            rate_factor: What the present learning rates are multiplied by.
            cooldown: Fraction of the steps, at the end, over which they fall to zero.

        Raises:
            ConfigError: If there are fewer rows than a step takes.
        """
        micro_batch = min(micro_batch, batch_rows)
        if batch_rows % micro_batch:
            raise ConfigError(f"a step of {batch_rows} rows cannot be made of batches of {micro_batch}.")
        num_steps = len(rows) // batch_rows
        if not num_steps:
            raise ConfigError(f"{len(rows)} rows make no step of {batch_rows}.")
        arm = _copy(self.module)
        loader = DataLoader(
            Subset(self.loader.dataset, rows[: num_steps * batch_rows]), micro_batch, collate_fn=self.loader.collate_fn
        )
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = Trainer(
                max_epochs=1,
                accumulate_grad_batches=batch_rows // micro_batch,
                callbacks=[_Rates(self.optimizer_state, num_steps, rate_factor, cooldown)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                use_distributed_sampler=False,
                devices=1,
                **self.trainer_options,
            )
            trainer.fit(arm, loader)
        return arm


class _Rates(Callback):
    """Goes on with the optimizer's state at a constant rate, and cools down at the end."""

    def __init__(self, state: dict[str, Any] | None, num_steps: int, factor: float, cooldown: float) -> None:
        self.state = state
        self.num_steps = num_steps
        self.factor = factor
        self.first_cool = num_steps - max(1, round(cooldown * num_steps)) if cooldown else num_steps
        self._rates: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        if self.state is not None:
            optimizer.load_state_dict(copy.deepcopy(self.state))
        trainer.strategy.lr_scheduler_configs = []
        self._rates = [group["lr"] * self.factor for group in optimizer.param_groups]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        left = (self.num_steps - trainer.global_step) / (self.num_steps - self.first_cool + 1)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, left)


def row_losses(module: LightningModule, loader: DataLoader[Any], rows: Sequence[int]) -> Tensor:
    """Loss of each row alone in eval mode, ``(rows,)`` float64: the ``"loss"`` that ``predict_step`` gives.

    Raises:
        ConfigError: If it gives none.
    """
    was_training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            losses = [_row_loss(module, loader, row) for row in rows]
    finally:
        for child, training in was_training.items():
            child.training = training
    return torch.tensor(losses, dtype=torch.float64)


def _row_loss(module: LightningModule, loader: DataLoader[Any], row: int) -> float:
    batch = module.transfer_batch_to_device(loader.collate_fn([loader.dataset[row]]), module.device, 0)
    predicted = module.predict_step(batch, 0)
    if not isinstance(predicted, Mapping) or "loss" not in predicted:
        raise ConfigError(
            f"a probe compares single rows: let {type(module).__name__}.predict_step return a mapping with their "
            '"loss", of shape (rows,).'
        )
    return float(predicted["loss"].mean())


def _copy(module: LightningModule) -> LightningModule:
    """A deep copy that shares frozen weights and knows no Trainer."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
    if module._trainer is not None:
        memo[id(module._trainer)] = None
    twin = copy.deepcopy(module, memo)
    twin._trainer = None
    return twin


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
