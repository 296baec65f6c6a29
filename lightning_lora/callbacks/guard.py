"""Checks that every adapter takes effect and that frozen weights stay as they were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.errors import CallbackSettingError, GuardError, check_arguments, first_five
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.lora.changed_tensors import recorded_parameters
from lightning_lora.lora.fingerprint import base_digests
from lightning_lora.lora.layers.adapted import learning_layers, lora_layers
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.lora.shards import is_dtensor, reshard
from lightning_lora.mixin.given_settings import check_they_have_a_reader
from lightning_lora.mixin.lightning_callbacks import keep_averages_exact, refuse_callbacks
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.optim import check_optimizers
from lightning_lora.sharding.collectives import largest_of_ranks, missing_on_all_ranks

from .finite import check_finite_weights, infinite_on_any_rank, local_values, trained_weights
from .layer_calls import LayerCallRecorder
from .one_reading import reading_of

_GRADIENTS, _WEIGHTS = "gradients of adapters", "infinite weights"


class LoRAGuard(Callback):
    """Stops a run in which an adapter would silently do nothing, and checks at the end that the base is unchanged.

    - Every adapter is in an optimizer, except for those that stay frozen in a frozen copy.
    - Its layer is called, and it gets a gradient, within ``patience`` optimizer steps.
    - The first evaluation uses every adapted layer; torch's fast paths can bypass one.
    - Every adapter has moved by the end, unless the learning rate was always 0.
    - Base weights are bit for bit what they were (up to 65,536 sampled values per tensor). Buffers may change, and
      so may a frozen copy of the network, such as a teacher: both are saved.
    - No trained weight is NaN or infinite, which the loss need not show, as fused attention can hide it. Checked every
      ``patience`` optimizer steps, before each validation, and before each checkpoint is written.

    A module whose ``has_learning_signal`` is False, such as a policy that has earned no reward yet, need not move.
    Without adapters the guard refuses a module that has LoRA settings all the same, and else does nothing.

    Args:
        patience: Optimizer steps within which every adapter must have run and had a non-zero gradient, and between two
            checks of the weights.

    Raises:
        GuardError: With the names of the layers or weights.
    """

    def __init__(self, patience: int = 10) -> None:
        check_arguments(LoRAGuard, locals(), CallbackSettingError)
        self.patience = patience
        self._training: LayerCallRecorder | None = None
        self._evaluation: LayerCallRecorder | None = None
        self._without_gradient: set[str] = set()
        self._base: dict[str, str] = {}
        self._first_step = self._checked_step = 0
        self._learning = False
        self._must_ask_ranks = False
        # The layer of each gradient that was asked for; empty if no answer is awaited.
        self._asked: list[str] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous run, and refuse callbacks that would change the base of an adapted module."""
        self._training = self._evaluation = None
        self._base, self._without_gradient, self._learning, self._asked = {}, set(), False, []
        if lora_layers(pl_module):
            refuse_callbacks(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take digests of base weights; refuse LoRA settings of a module without `LoRAMixin`."""
        if not isinstance(pl_module, LoRAMixin):
            check_they_have_a_reader(pl_module)
        self._base = base_digests(pl_module, _moving_names(pl_module), exact=True) if lora_layers(pl_module) else {}
        if self._base:
            keep_averages_exact(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every adapter will be trained."""
        layers = learning_layers(pl_module)
        if layers:
            check_optimizers(pl_module, trainer.optimizers)
            check_not_merged(pl_module, "train")
        # DeepSpeed keeps gradients inside its engine; at the end the move of each adapter is checked all the same.
        self._without_gradient = set() if isinstance(trainer.strategy, DeepSpeedStrategy) else set(layers)
        self._first_step = self._checked_step = trainer.global_step
        # Under FSDP1 a rank may hold no part of an adapter, and then sees neither its gradient nor its move.
        self._must_ask_ranks = isinstance(trainer.strategy, FSDPStrategy)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record which adapted layers run in training."""
        self._training = self._training or LayerCallRecorder(pl_module)
        self._training.start(pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask which adapters have had a gradient in the step."""
        if self._without_gradient and not is_accumulating(trainer):
            self._ask_for_gradients(trainer, pl_module)
            if not pl_module.automatic_optimization:  # which may forget this gradient at once
                self._take_gradients(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the answers, and remember whether any weight can move: a warm-up starts at learning rate 0."""
        self._take_gradients(trainer)
        self._take_weights(trainer, pl_module)
        self._learning = self._learning or any(group["lr"] > 0 for group in optimizer.param_groups)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report adapters that did not run, or had no gradient, for ``patience`` optimizer steps."""
        assert self._training is not None
        self._training.stop()
        self._take_gradients(trainer)
        if trainer.global_step >= self._checked_step + self.patience:
            # The answer comes with those of the next step.
            self._checked_step = trainer.global_step
            weights = list(trained_weights(pl_module).values()) if lora_layers(pl_module) else []
            reading_of(trainer).ask(_WEIGHTS, infinite_on_any_rank(trainer, weights))
        if not _has_signal(pl_module):
            self._first_step = trainer.global_step
        if trainer.global_step < self._first_step + self.patience:
            return
        period = f"{self.patience} optimizer steps"
        if self._training.not_called:
            raise GuardError(_bypassed(self._training.not_called, f"training for {period}"))
        if self._must_ask_ranks:
            self._must_ask_ranks = False
            self._without_gradient = set(
                missing_on_all_ranks(trainer, learning_layers(pl_module), self._without_gradient)
            )
        if self._without_gradient:
            raise GuardError(
                f"{len(self._without_gradient)} adapters got no gradient in {period}: "
                f"{first_five(sorted(self._without_gradient))}. Their layers do not reach the loss, or activation "
                f"checkpointing is reentrant with frozen inputs (use_reentrant=False)."
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before validation that all trained weights are finite."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_finite(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a checkpoint is written that all trained weights are finite."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_finite(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record which adapted layers run in the first evaluation."""
        self._evaluation = self._evaluation or LayerCallRecorder(pl_module)
        self._evaluation.start(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the layers their own methods back."""
        assert self._evaluation is not None
        self._evaluation.stop()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report adapters that the first evaluation did not use."""
        calls = self._evaluation
        if calls is None or not calls.not_called:
            return
        if calls.bypassed:
            raise GuardError(_bypassed(calls.bypassed, "evaluation"))
        warnings.warn(
            f"{len(calls.not_called)} adapters took no part in evaluation: {first_five(calls.not_called)}. That is "
            f"right only if evaluation does not use their part of the module.",
            stacklevel=2,
        )
        calls.not_called.clear()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the layers their own methods back."""
        self._stop_recording()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every adapter has moved and that the base has not."""
        self._take_weights(trainer, pl_module)
        self._stop_recording()
        reshard(pl_module)
        layers = learning_layers(pl_module) if _has_signal(pl_module) else {}
        if not self._base or not self._learning:
            return
        unmoved = [name for name, layer in layers.items() if not layer.lora_moved]
        if isinstance(trainer.strategy, FSDPStrategy):
            unmoved = missing_on_all_ranks(trainer, layers, unmoved)
        not_called = [name for name in self._training.not_called if name in unmoved] if self._training else []
        if not_called:
            raise GuardError(_bypassed(not_called, "training"))
        if unmoved:
            raise GuardError(
                f"{len(unmoved)} of {len(layers)} adapters did not move in training: {first_five(unmoved)}."
            )
        self._check_base(pl_module)

    def _check_base(self, module: LightningModule) -> None:
        moving = _moving_names(module)
        digests = base_digests(module, moving, exact=True)
        changed = [n for n, digest in self._base.items() if n not in moving and digests.get(n) != digest]
        if changed:
            raise GuardError(f"{len(changed)} frozen base weights were changed by training: {first_five(changed)}.")

    def _check_finite(self, trainer: Trainer, module: LightningModule) -> None:
        self._checked_step = trainer.global_step
        reading_of(trainer).drop(_WEIGHTS)
        check_finite_weights(trainer, module)

    def _take_weights(self, trainer: Trainer, module: LightningModule) -> None:
        if reading_of(trainer).take(_WEIGHTS) not in (None, [0]):
            check_finite_weights(trainer, module)

    def _ask_for_gradients(self, trainer: Trainer, module: LightningModule) -> None:
        """Ask for the largest entry of the gradient of each factor of layers that have had none so far."""
        layers = lora_layers(module)
        factors = ((n, factor) for n in sorted(self._without_gradient) for factor in layers[n].lora_factors().values())
        gradients = [(name, factor.grad) for name, factor in factors if factor.grad is not None]
        if not gradients:
            return
        parts = [local_values(gradient) for _, gradient in gradients]
        # A rank may hold an empty shard.
        parts = [part if part.numel() else part.new_zeros(1) for part in parts]
        largest = torch.stack(torch._foreach_norm(parts, math.inf))
        if any(is_dtensor(gradient) for _, gradient in gradients):
            largest = largest_of_ranks(trainer, largest)
        self._asked = [name for name, _ in gradients]
        reading_of(trainer).ask(_GRADIENTS, largest)

    def _take_gradients(self, trainer: Trainer) -> None:
        """Remember which adapters have had a gradient."""
        if not self._asked:
            return
        largest = reading_of(trainer).take(_GRADIENTS) or []
        # NaN is a gradient too.
        self._without_gradient -= {name for name, entry in zip(self._asked, largest, strict=True) if entry != 0}
        self._asked = []

    def _stop_recording(self) -> None:
        for calls in (self._training, self._evaluation):
            if calls is not None:
                calls.stop()


def _bypassed(names: Sequence[str], period: str) -> str:
    return (
        f"{len(names)} adapters took no part in {period}: {first_five(names)}. Something computes with their weights "
        f"without calling them (a fused path, F.linear(x, layer.weight)), or the layers are not used: exclude them, "
        f"or make the module call them."
    )


def _has_signal(module: LightningModule) -> bool:
    return getattr(module, "has_learning_signal", True)


def _moving_names(module: nn.Module) -> set[str]:
    """Names of the parameters that may change: those that train, and those of frozen copies that follow them."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return trained | recorded_parameters(module)
