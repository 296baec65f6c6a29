"""LoRA for your own LightningModule: add one base class and set ``lora = LoRAConfig()``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_lora.checkpoints import contents
from lightning_lora.checkpoints.ckpt_path import explain_ckpt_path
from lightning_lora.errors import TargetNotFoundError, did_you_mean
from lightning_lora.files.adapter import save_load
from lightning_lora.lora import merging
from lightning_lora.lora.changed_tensors import record_tensors
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.fingerprint import WeightPrint, base_prints
from lightning_lora.lora.frozen_copies import adopt_copies, frozen_copies, notes_on_unmatched
from lightning_lora.lora.functional.torch_internals import has_values
from lightning_lora.lora.layers.adapted import factor_parameters, keep_gates, lora_layers
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.reports import MergeReport
from lightning_lora.lora.shards import full_parameters, reshard
from lightning_lora.mixin import given_settings, gradient_start, optim, rates, run_hooks
from lightning_lora.mixin.around_root import inject_below
from lightning_lora.mixin.checked_loading import CheckedLoading
from lightning_lora.mixin.held_base import autocast_dtype, hold_base
from lightning_lora.mixin.lightning_callbacks import refuse_callbacks
from lightning_lora.mixin.memory_settings import choices_of
from lightning_lora.mixin.precision import quantise_first, refuse_replaced_layers
from lightning_lora.mixin.run_hooks import outermost
from lightning_lora.step_memory import StepMemory

_UNSET: Any = contents.NotGiven()
_HOOKS = {
    "configure_model": outermost(before=run_hooks.run_starts, after=run_hooks.configured),
    "on_fit_start": outermost(after=run_hooks.fit_starts),
    "on_train_start": outermost(before=run_hooks.train_starts, after=run_hooks.resume_run),
    "on_train_epoch_start": outermost(after=run_hooks.epoch_starts),
    "on_fit_end": outermost(before=run_hooks.fit_ends),
    "on_before_optimizer_step": outermost(after=run_hooks.before_step),
    "on_save_checkpoint": outermost(after=run_hooks.after_save),
    "on_load_checkpoint": outermost(before=run_hooks.before_load),
}


class LoRAMixin(CheckedLoading):
    """Gives a LightningModule adapters, adapter-only checkpoints and parameter groups; list it first among the bases.

    ``lora`` may be a class attribute, set in ``__init__``, or passed to it; ``None`` means full fine-tuning with the
    same module. Adapters are injected at the end of the outermost ``configure_model``: before the optimizer is built,
    before a strategy wraps or shards the module, and in ``load_from_checkpoint``. A module that shards itself in
    ``configure_model`` must call `apply_lora` there first.

    Example::

        class Mine(LoRAMixin, LightningModule):
            lora = LoRAConfig(rank=16)

    Args:
        lora: A `LoRAConfig`, a mapping of its fields, or None for full fine-tuning.
        lora_root: Dotted name of the submodule to adapt; everything outside it is frozen, unless ``trainable`` names it
            by its name in this module. None: the whole module.
    """

    lora: LoRAConfig | dict[str, Any] | None = None
    lora_root: str | None = None
    # Whether to load checkpoints whose adapters were trained on other base weights.
    lora_allow_other_base: bool = False
    # Whether mixed precision holds the frozen weights below ``lora_root`` in the type that it multiplies in: half of
    # their memory. A module that relies on float32 weights outside of autocast leaves it False.
    lora_autocast_base: bool = False
    # What a training step keeps in memory to be faster, as a `StepMemory` or a mapping of its fields.
    step_memory: StepMemory | dict[str, Any] | None = None
    # Its choices that this class can follow.
    step_memory_choices: ClassVar[tuple[str, ...]] = ("gate",)
    # The choices of this run; None: those of ``step_memory``.
    _step_memory_in_use: StepMemory | None = None
    # The type that frozen weights are held in, and the one of their files, if the two may differ.
    _lora_held: torch.dtype | None = None
    _lora_stored: torch.dtype | None = torch.float32
    _keeps_float32: str = ""  # how, for the message
    _lora_base: dict[str, WeightPrint] | None = None
    # The settings and the root with which `apply_lora` has adapted the module.
    _lora_made_with: tuple[LoRAConfig, str | None] | None = None

    def __init__(self, *args: Any, lora: Any = _UNSET, lora_root: Any = _UNSET, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if lora is not _UNSET:
            self.lora = None if lora is None else LoRAConfig.from_dict(lora)
        if lora_root is not _UNSET:
            self.lora_root = lora_root

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A hook of the user's class overrides ours. Wrapping it keeps LoRA active even if it does not call super().
        for name, wrap in _HOOKS.items():
            hook = getattr(cls, name)
            if not hasattr(hook, "keeps_lora"):
                setattr(cls, name, wrap(hook))

    @override
    @_HOOKS["configure_model"]
    def configure_model(self) -> None:
        """Inject the adapters after the module has built its layers."""
        super().configure_model()

    @override
    @_HOOKS["on_fit_start"]
    def on_fit_start(self) -> None:
        """Record the random state from which the data of the first epoch are drawn."""
        super().on_fit_start()

    @override
    @_HOOKS["on_train_start"]
    def on_train_start(self) -> None:
        """Refuse to train if an adapter is in no optimizer; continue exactly where a loaded checkpoint was written."""
        super().on_train_start()

    @override
    @_HOOKS["on_train_epoch_start"]
    def on_train_epoch_start(self) -> None:
        """Record the random state from which the data of the epoch are drawn."""
        super().on_train_epoch_start()

    @override
    @_HOOKS["on_before_optimizer_step"]
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse to train a base weight that something has unfrozen."""
        super().on_before_optimizer_step(optimizer)

    @override
    @_HOOKS["on_save_checkpoint"]
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only adapters, fully trained modules and buffers in the checkpoint."""
        super().on_save_checkpoint(checkpoint)

    @override
    @_HOOKS["on_load_checkpoint"]
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the module before anything is loaded."""
        super().on_load_checkpoint(checkpoint)

    def apply_lora(self) -> None:
        """Inject the adapters now; do nothing with ``lora=None`` or if the module is already adapted with ``lora``.

        Call it in ``configure_model`` if you shard the module there, before sharding it.

        Raises:
            ConfigError: If a setting is invalid, the module is adapted with other settings, or settings that it was
                given did not reach ``lora``.
            TargetNotFoundError: If a name pattern matches nothing.
            AlreadyShardedError: If the module is already sharded.
        """
        if self._trainer is not None:
            explain_ckpt_path(self._trainer)
        given_settings.check_they_take_effect(self)
        if self.lora is None:
            return
        refuse_callbacks(self._trainer)
        refuse_replaced_layers(self)
        quantise_first(self)
        root = self._lora_module()
        choices = choices_of(self)
        given_settings.check_unchanged(self)
        if lora_layers(root):
            for note in adopt_copies(self):
                rank_zero_info(f"lora: {note}")
            self._hold_base(root)
            self.use_step_memory(choices)
            return
        copies = {} if root is self else frozen_copies(self)
        # Before the injection, which records those inside ``root``.
        record_tensors(self)
        self._lora_made_with = LoRAConfig.from_dict(self.lora), self.lora_root
        gradient_start.check_possible(self, self._lora_made_with[0])
        report = inject_below(self, self.lora_root, root, self._lora_made_with[0])
        rank_zero_info("\n".join([str(report), *(f"lora: {note}" for note in notes_on_unmatched(self, copies))]))
        self._record_base()
        self._hold_base(root)
        self.use_step_memory(choices)
        if self.training and not all(layer.training for layer in lora_layers(root).values()):
            warnings.warn(
                "the base model is in eval mode (as from_pretrained leaves it) and Lightning will not switch it: its "
                "dropout and that of the adapters are off in training. Call .train() on it in __init__ or "
                "configure_model.",
                stacklevel=2,
            )

    def lora_parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Make optimizer groups by the learning-rate rule; see `lightning_lora.mixin.optim.parameter_groups`.

        Raises:
            ConfigError: If the rate is invalid, nothing is trainable, or ``lora`` is set and nothing is adapted.
        """
        optim.check_learning_rate(learning_rate)
        given_settings.check_they_are_used(self)
        groups = optim.parameter_groups(self, learning_rate)
        if self._trainer is None:  # else the start of training prints the rates, when schedulers have set theirs
            rates.report_groups(self, groups)
        return groups

    def use_step_memory(self, memory: StepMemory) -> None:
        """Train with these choices from now on; those that are open are as if no device told its memory."""
        self._step_memory_in_use = memory = StepMemory.from_dict(memory)
        keep_gates(self, memory.gate == "keep")

    def merge_lora(self) -> MergeReport:
        """Add the updates to the base weights, in place; see `lightning_lora.merge_lora`."""
        return merging.merge_lora(self)

    def save_adapter(self, path: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the adapters as a PEFT folder; see `lightning_lora.save_adapter`."""
        reshard(self)
        wrapper = None if self._trainer is None else self.trainer.strategy.model
        with full_parameters(wrapper or self):
            return save_load.save_adapter(self, path, summary)

    @property
    @override
    def hparams_initial(self) -> Any:
        """Hyperparameters for loggers, with LoRA settings as plain types that any YAML reader understands."""
        return contents.plain_settings(super().hparams_initial)

    @property
    @override
    def strict_loading(self) -> bool:
        """False for an adapted module, whose checkpoints hold no frozen weights; this package checks their contents."""
        return LightningModule.strict_loading.fget(self) and not lora_layers(self)  # pyright: ignore[reportOptionalCall]

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        LightningModule.strict_loading.fset(self, strict_loading)  # pyright: ignore[reportOptionalCall]

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load ``state_dict``; if it has adapters, is not to be loaded strictly, and the module has none, adapt it.

        So Lightning hands over what child processes have trained (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).
        """
        if not strict and self.lora is not None and not lora_layers(self) and any(map(is_factor, state_dict)):
            self.configure_model()
            # The base comes from the state dict too.
            self._lora_base = None
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _base_prints(self) -> dict[str, WeightPrint] | None:
        """Prints of the base at injection, or now if it had no values then; every rank must call it."""
        strategy = getattr(self._trainer, "strategy", None)
        # These strategies leave shards under the names of whole weights.
        if self._lora_base is None and not isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
            self._record_base()
        return self._lora_base

    def _hold_base(self, root: nn.Module) -> None:
        dtype = autocast_dtype(self._trainer) if self.lora_autocast_base and self._lora_held is None else None
        is_merged = any(layer.lora_merged for layer in lora_layers(root).values())
        if dtype is not None and not is_merged and hold_base(root, dtype, self._keeps_float32):
            self._lora_held = dtype

    def _record_base(self) -> None:
        root = self._lora_module()
        if all(map(has_values, root.parameters())):
            trained = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
            self._lora_base = base_prints(root, trained)

    def _lora_module(self) -> nn.Module:
        if self.lora_root is None:
            return self
        modules = dict(self.named_modules())
        if self.lora_root not in modules:
            hint = did_you_mean(str(self.lora_root), modules)
            raise TargetNotFoundError(f"lora_root {self.lora_root!r} is not a submodule of {type(self).__name__}{hint}")
        return modules[self.lora_root]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the dtype of adapters: 'true' precision plugins lower every parameter, resumed ones too."""
        given_settings.check_not_passed_over(self)
        wide = {factor: factor.data for factor in factor_parameters(self).values()}
        super()._apply(fn, recurse)
        for factor, data in wide.items():
            lowered = torch.promote_types(factor.dtype, data.dtype) != factor.dtype
            if lowered and not isinstance(factor, DTensor):
                factor.data = data.to(factor.device)
        return self
