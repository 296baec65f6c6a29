"""Trains short branches from one point of a run, without changing the run.

A branch trains a copy of the module, which shares the frozen weights, with a copy of the optimizer's state. So weights,
gradients, optimizer, schedules and the place in the data of the run stay as they are by construction. Random numbers
are restored.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_lora.batch.accumulation import fit_to_batch
from lightning_lora.errors import ProbeError
from lightning_lora.lora.gradient_start import has_started, waiting_layers
from lightning_lora.study.row_losses import HeldOut, row_losses
from lightning_lora.study.snapshot import copy_module, isolated

COOLDOWN = 0.2
"""Fraction of a branch's steps, at its end, over which the learning rate falls to zero."""


class BranchPoint:
    """The point of a run that branches start from.

    Args:
        module: The module, trained or fresh, with its layers built, on its device; it is not changed.
        optimizer_state: ``state_dict()`` of its optimizer, whose learning rates and moments branches continue with.
            None: the learning rates of ``configure_optimizers`` without a warm-up, and fresh moments.
        loader: The training loader, whose dataset and ``collate_fn`` branches use.
        micro_batch: Most rows of one forward and backward pass.
        trainer_options: Options for the Trainer of a branch, such as ``precision`` and ``gradient_clip_val``.
        rate_factors: Multiply the initial learning rates of the groups, or all by the largest where the module has
            another number of groups; used only without ``optimizer_state``.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizer_state: Mapping[str, Any] | None,
        loader: DataLoader[Any],
        micro_batch: int,
        trainer_options: Mapping[str, Any] | None = None,
        rate_factors: Sequence[float] = (1.0,),
    ) -> None:
        self.module = module
        self.optimizer_state = optimizer_state
        self.loader = loader
        self.micro_batch = micro_batch
        self.trainer_options = dict(trainer_options or {})
        self.rate_factors = list(rate_factors)

    def with_fresh_moments(self, module: LightningModule) -> BranchPoint:
        """The same point with other weights, and fresh moments at the present learning rates."""
        phases = present_phases(self.optimizer_state) if self.optimizer_state is not None else self.rate_factors
        return BranchPoint(module, None, self.loader, self.micro_batch, self.trainer_options, phases)

    def with_started_adapters(self, rows: Sequence[Any]) -> BranchPoint:
        """The same point with adapters that wait for it (``init="gradient"``) started on the first ``rows``.

        Otherwise every branch would start them by itself, on batches of its own size.
        """
        layers = waiting_layers(self.module)
        if not layers or has_started(layers):
            return self
        with isolated(self.module.device, 0):
            started = copy_module(self.module)
            trainer = self._trainer(1, [_EndsBeforeFirstStep()])
            dataset, collate = self.loader.dataset, self.loader.collate_fn
            with suppress(_StartedError):
                trainer.fit(started, DataLoader(Subset(dataset, rows), self.micro_batch, collate_fn=collate))
            _free(trainer, started)
        options = self.trainer_options
        return BranchPoint(started, self.optimizer_state, self.loader, self.micro_batch, options, self.rate_factors)

    def losses_after(
        self,
        rows: Sequence[Any],
        batch_rows: int,
        ratio: float,
        held_out: HeldOut,
        seed: int = 0,
    ) -> Tensor:
        """Train a copy of the module on ``rows`` in their order, once, and score it on held-out rows.

        Args:
            batch_rows: Rows of an optimizer step; rows that do not fill a last step are not used.
            ratio: ``batch_rows`` over the batch of the run; `fit_to_batch` adjusts learning rates to it.
            held_out: The rows to score on.
            seed: Seeds dropout and other random draws of the branch.

        Returns:
            The loss of each held-out row, ``(rows,)`` float64, nats.

        Raises:
            ConfigError: If there are fewer rows than a step takes, or the module returns no losses of rows.
        """
        num_steps = len(rows) // batch_rows
        if not num_steps:
            raise ProbeError(f"a branch needs at least {batch_rows} training rows, got {len(rows)}: lower the ratio.")
        micro_batch = max(size for size in range(1, self.micro_batch + 1) if batch_rows % size == 0)
        batches = DataLoader(
            Subset(self.loader.dataset, rows[: num_steps * batch_rows]), micro_batch, collate_fn=self.loader.collate_fn
        )
        rates = _Rates(self.optimizer_state, num_steps, ratio, self.rate_factors)
        with isolated(self.module.device, seed):
            branch = copy_module(self.module)
            trainer = self._trainer(batch_rows // micro_batch, [rates])
            trainer.fit(branch, batches)
            losses = row_losses(trainer, branch, held_out, self.micro_batch)
            _free(trainer, branch)
        return losses

    def losses_now(self, held_out: HeldOut) -> Tensor:
        """The loss of the untrained copy on each held-out row, ``(rows,)`` float64, nats.

        Raises:
            ConfigError: If the module returns no losses of rows.
        """
        with isolated(self.module.device, 0):
            branch = copy_module(self.module)
            trainer = self._trainer(1, [])
            losses = row_losses(trainer, branch, held_out, self.micro_batch)
            _free(trainer, branch)
        return losses

    def _trainer(self, accumulation: int, callbacks: list[Callback]) -> Trainer:
        device = self.module.device
        # Copied, because a precision plugin has a state and belongs to one Trainer.
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


def present_phases(optimizer_state: Mapping[str, Any]) -> list[float]:
    """The present learning rate of each group over its initial one, as schedules have changed it."""
    phases = []
    for group in optimizer_state["param_groups"]:
        initial = group.get("initial_lr", group["lr"])
        phases.append(float(group["lr"] / initial) if initial and math.isfinite(initial) else 1.0)
    return phases


def check_one_optimizer(trainer: Trainer, module: LightningModule) -> None:
    """Raise `ConfigError` unless Lightning steps a single optimizer, whose state branches can continue with."""
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        by_hand = "" if module.automatic_optimization else " and steps them itself"
        raise ProbeError(
            f"a probe needs a single optimizer that Lightning steps: {type(module).__name__} has "
            f"{len(trainer.optimizers)}{by_hand}."
        )


class _InPlace(SingleDeviceStrategy):
    """Does not move weights to the CPU at the end, because the run uses the same frozen weights."""

    @override
    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class _Rates(Callback):
    """Keeps a constant learning rate that fits the batch, and lowers it to zero at the end."""

    def __init__(self, state: Mapping[str, Any] | None, num_steps: int, ratio: float, factors: Sequence[float]) -> None:
        self.state = state
        self.num_steps = num_steps
        self.ratio = ratio
        self.factors = factors
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
            groups, factors = optimizer.param_groups, self.factors
            factors = factors if len(factors) == len(groups) else [max(factors)] * len(groups)
            for group, factor in zip(groups, factors, strict=True):
                group["lr"] = factor * group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups:
            fit_to_batch(group, 1.0, self.ratio)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if not any(self._rates):
            raise ProbeError("the learning rate is 0 at this step, so branches learn nothing: probe at another step.")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        left = (self.num_steps - trainer.global_step) / (self.num_cool + 1)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, left)


class _StartedError(Exception):
    """Ends a run that was only for the first values of its adapters."""


class _EndsBeforeFirstStep(Callback):
    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise _StartedError  # the module has started its adapters in on_train_start


def _free(trainer: Trainer, branch: LightningModule) -> None:
    """Free the memory of a branch: a Trainer refers to itself, so Python alone would free it late."""
    branch.trainer = None
    trainer.strategy.optimizers = []
    trainer.strategy._lightning_module = trainer.strategy._model = None
    if branch.device.type == "cuda":
        gc.collect()
