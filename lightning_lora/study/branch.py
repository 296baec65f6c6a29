"""Short runs from one snapshot of a module in training, which itself is not touched.

A branch trains a copy: of what is trained, with what it needs of the optimizer; frozen weights are shared. So weights,
gradients, optimizer, schedules and the place in the data of the run that is branched from stay as they are by
construction, and random numbers are put back.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_lora.batch.accumulation import fit_to_batch
from lightning_lora.errors import ConfigError
from lightning_lora.study.row_losses import row_losses
from lightning_lora.study.snapshot import apart, copied

COOLDOWN = 0.2
"""Fraction of a branch's steps, at its end, over which the learning rate falls to zero."""


class Branch:
    """What a short run starts from.

    Args:
        module: On its device, trained or fresh, its layers built; not changed.
        optimizer_state: ``state_dict()`` of its optimizer: its learning rates are the present ones, and its moments are
            gone on with. None: the rates that ``configure_optimizers`` gives, without a warm-up, and fresh moments.
        loader: Rows are taken from its dataset, and made batches by its ``collate_fn``.
        micro_batch: Rows that the device is given at once.
        trainer_options: Of the Trainer of each run, such as ``precision`` and ``gradient_clip_val``.
        rate_factor: Of the rates, where they are fresh.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizer_state: Mapping[str, Any] | None,
        loader: DataLoader[Any],
        micro_batch: int,
        trainer_options: Mapping[str, Any] | None = None,
        rate_factor: float = 1.0,
    ) -> None:
        self.module = module
        self.optimizer_state = optimizer_state
        self.loader = loader
        self.micro_batch = micro_batch
        self.trainer_options = dict(trainer_options or {})
        self.rate_factor = rate_factor

    def losses_after(
        self,
        rows: Sequence[Any],
        batch_rows: int,
        ratio: float,
        held_out: tuple[DataLoader[Any], Sequence[int]],
        seed: int = 0,
    ) -> Tensor:
        """Train a copy of the module on ``rows`` in their order, once, and give its loss on each held-out row.

        Args:
            rows: What the dataset is asked for.
            batch_rows: Rows of an optimizer step; what is left over of ``rows`` is not used.
            ratio: ``batch_rows`` over that of the run, which rates follow by `fit_to_batch`.
            held_out: A loader, and the rows of its dataset.
            seed: Of what the branch draws at random, such as dropout.

        Returns:
            ``(rows,)`` float64, nats.

        Raises:
            ConfigError: If there are fewer rows than a step takes, or the module gives no losses of rows.
        """
        num_steps = len(rows) // batch_rows
        if not num_steps:
            raise ConfigError(f"{len(rows)} rows make no step of {batch_rows}.")
        micro_batch = max(size for size in range(1, self.micro_batch + 1) if batch_rows % size == 0)
        batches = DataLoader(
            Subset(self.loader.dataset, rows[: num_steps * batch_rows]), micro_batch, collate_fn=self.loader.collate_fn
        )
        rates = _Rates(self.optimizer_state, num_steps, ratio, self.rate_factor)
        with apart(self.module.device, seed):
            arm = copied(self.module)
            trainer = self._trainer(batch_rows // micro_batch, [rates])
            trainer.fit(arm, batches)
            losses = row_losses(trainer, arm, *held_out, self.micro_batch)
            _forget(trainer, arm)
        return losses

    def losses_now(self, held_out: tuple[DataLoader[Any], Sequence[int]]) -> Tensor:
        """The loss of the module as it is on each held-out row, ``(rows,)`` float64, nats.

        Raises:
            ConfigError: If the module gives none.
        """
        with apart(self.module.device, 0):
            arm = copied(self.module)
            trainer = self._trainer(1, [])
            losses = row_losses(trainer, arm, *held_out, self.micro_batch)
            _forget(trainer, arm)
        return losses

    def _trainer(self, accumulation: int, callbacks: list[Callback]) -> Trainer:
        device = self.module.device
        # A precision plugin has a state, and belongs to one Trainer.
        plugins = copy.deepcopy(list(self.trainer_options.get("plugins", [])))
        options: dict[str, Any] = self.trainer_options | {"plugins": [LightningEnvironment(), *plugins]}
        return Trainer(
            max_epochs=1,
            accumulate_grad_batches=accumulation,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            inference_mode=False,
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            strategy=_InPlace(device),
            **options,
        )


class _InPlace(SingleDeviceStrategy):
    """Leaves weights where they are at the end: the frozen ones are also those of the run that is branched from."""

    @override
    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class _Rates(Callback):
    """Goes on at a constant rate that fits the batch, and cools down at the end."""

    def __init__(self, state: Mapping[str, Any] | None, num_steps: int, ratio: float, factor: float) -> None:
        self.state = state
        self.num_steps = num_steps
        self.ratio = ratio
        self.factor = factor
        self.num_cool = max(1, round(COOLDOWN * num_steps))
        self._rates: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_one_optimizer(trainer, pl_module)
        (optimizer,) = trainer.optimizers
        trainer.strategy.lr_scheduler_configs = []
        if self.state is not None:
            optimizer.load_state_dict(copy.deepcopy(dict(self.state)))
        else:
            for group in optimizer.param_groups:
                group["lr"] = self.factor * group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups:
            fit_to_batch(group, 1.0, self.ratio)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if not any(self._rates):
            raise ConfigError("the learning rate is 0 here, and a branch would learn nothing: probe at another step.")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        left = (self.num_steps - trainer.global_step) / (self.num_cool + 1)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, left)


def _forget(trainer: Trainer, arm: LightningModule) -> None:
    """Free the copy: a Trainer is a ring of references, which Python may keep for long."""
    arm.trainer = None
    trainer.strategy.optimizers = []
    trainer.strategy._lightning_module = trainer.strategy._model = None
    if arm.device.type == "cuda":
        gc.collect()


def present_phase(optimizer_state: Mapping[str, Any]) -> float:
    """Where a schedule is now: the present learning rate over that without a schedule."""
    group = optimizer_state["param_groups"][0]
    initial = group.get("initial_lr", group["lr"])
    return float(group["lr"] / initial) if initial and math.isfinite(initial) else 1.0


def check_one_optimizer(trainer: Trainer, module: LightningModule) -> None:
    """Raise `ConfigError` unless Lightning steps one optimizer, whose state a branch can go on with."""
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        by_itself = "" if module.automatic_optimization else " and steps by itself"
        raise ConfigError(
            f"a probe needs one optimizer that Lightning steps: {type(module).__name__} has "
            f"{len(trainer.optimizers)}{by_itself}."
        )
