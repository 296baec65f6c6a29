"""LoRA for your own LightningModule: add one base class and set ``lora = LoRAConfig()``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Self, override

from lightning_lora.checkpoints import contents, optimizer_state_names
from lightning_lora.checkpoints.ckpt_path import explain_ckpt_path
from lightning_lora.checkpoints.resume import RunMemory
from lightning_lora.checkpoints.wrapped_names import use_own_names
from lightning_lora.errors import ConfigError, TargetNotFoundError, did_you_mean
from lightning_lora.files.adapter import save_load
from lightning_lora.lora import adapter
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.fingerprint import base_digests, fingerprint
from lightning_lora.lora.layers.adapted import factor_parameters, lora_layers
from lightning_lora.lora.reports import MergeReport
from lightning_lora.lora.shards import full_parameters, reshard
from lightning_lora.mixin import optim
from lightning_lora.mixin.outermost_hooks import outermost
from lightning_lora.mixin.precision import quantise_first
from lightning_lora.trainer_access import found

_UNSET: Any = object()
_HOOKS = {
    "configure_model": outermost(after="apply_lora"),
    "on_fit_start": outermost(after="_fit_starts"),
    "on_train_start": outermost(before="_check_optimizers", after="_resume_run"),
    "on_train_epoch_start": outermost(after="_epoch_starts"),
    "on_save_checkpoint": outermost(after="_after_save"),
    "on_load_checkpoint": outermost(before="_before_load"),
}


class LoRAMixin(LightningModule):
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
        lora_root: Dotted name of the submodule to adapt; everything outside it stays unchanged. None: the whole module.
    """

    lora: LoRAConfig | dict[str, Any] | None = None
    lora_root: str | None = None
    # Whether to load checkpoints whose adapters were trained on other base weights.
    lora_allow_other_base: bool = False
    _lora_base_fingerprint: str | None = None
    _lora_loaded_states: list[dict[str, Any]] | None = None

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
        """Inject the adapters now; do nothing with ``lora=None`` or if the module is already adapted.

        Call it in ``configure_model`` if you shard the module there, before sharding it.

        Raises:
            ConfigError: If a setting is invalid.
            TargetNotFoundError: If a name pattern matches nothing.
            AlreadyShardedError: If the module is already sharded.
        """
        if self._trainer is not None:
            explain_ckpt_path(self.trainer)
        if self.lora is None:
            return
        quantise_first(self)
        root = self._lora_module()
        if lora_layers(root):
            return
        self._refuse_swa()
        report = adapter.inject_lora(root, LoRAConfig.from_dict(self.lora))
        rank_zero_info(str(report))
        self._compute_fingerprint()
        if self.training and not all(layer.training for layer in lora_layers(root).values()):
            warnings.warn(
                "the base model is in eval mode (as from_pretrained leaves it) and Lightning will not switch it: its "
                "dropout and that of the adapters are off in training. Call .train() on it in __init__ or "
                "configure_model.",
                stacklevel=2,
            )

    def lora_parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Make optimizer groups by the learning-rate rule; see `lightning_lora.mixin.optim.parameter_groups`."""
        return optim.parameter_groups(self, learning_rate)

    def merge_lora(self) -> MergeReport:
        """Add the updates to the base weights, in place; see `lightning_lora.merge_lora`."""
        return adapter.merge_lora(self)

    def save_adapter(self, path: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the adapters as a PEFT folder; see `lightning_lora.save_adapter`."""
        reshard(self)
        with full_parameters(self._outermost_wrapper()):
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
        return LightningModule.strict_loading.fget(self) and not self._has_adapters()  # pyright: ignore[reportOptionalCall]

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        LightningModule.strict_loading.fset(self, strict_loading)  # pyright: ignore[reportOptionalCall]

    def _outermost_wrapper(self) -> nn.Module:
        """The module as the strategy has wrapped it; the module itself outside a run."""
        return self if self._trainer is None else self.trainer.strategy.model or self

    def _has_adapters(self) -> bool:
        return bool(lora_layers(self))

    def _base_fingerprint(self) -> str | None:
        """Fingerprint of the base at injection, or now if it had no values then; every rank must call it."""
        strategy = getattr(self._trainer, "strategy", None)
        # These strategies leave shards under the names of whole weights.
        if self._lora_base_fingerprint is None and not isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
            self._compute_fingerprint()
        return self._lora_base_fingerprint

    def _compute_fingerprint(self) -> None:
        root = self._lora_module()
        if not any(parameter.is_meta for parameter in root.parameters()):
            trained = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
            self._lora_base_fingerprint = fingerprint(base_digests(root, trained))

    def _lora_module(self) -> nn.Module:
        if self.lora_root is None:
            return self
        modules = dict(self.named_modules())
        if self.lora_root not in modules:
            hint = did_you_mean(self.lora_root, modules)
            raise TargetNotFoundError(f"lora_root {self.lora_root!r} is not a submodule of {type(self).__name__}{hint}")
        return modules[self.lora_root]

    def _refuse_swa(self) -> None:
        if self._trainer is not None and found(self._trainer, StochasticWeightAveraging):
            raise ConfigError(
                "StochasticWeightAveraging copies the module before the adapters exist and would average the base. "
                "Use AdapterEMA instead."
            )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the dtype of adapters: 'true' precision plugins lower every parameter, resumed ones too."""
        wide = {factor: factor.data for factor in factor_parameters(self).values()}
        super()._apply(fn, recurse)
        for factor, data in wide.items():
            lowered = torch.promote_types(factor.dtype, data.dtype) != factor.dtype
            if lowered and not isinstance(factor, DTensor):
                factor.data = data.to(factor.device)
        return self

    def _check_optimizers(self) -> None:
        # Fabric calls hooks too, and there is no Trainer then.
        if self._trainer is not None and self._has_adapters():
            optim.check_optimizers(self, self.trainer.optimizers)
            adapter.check_not_merged(self, "train")

    def _run_memory(self) -> RunMemory:
        # The LoRA callback turns an existing module into this class, so that __init__ of this class never ran.
        return self.__dict__.setdefault("_lora_run_memory", RunMemory())

    def _fit_starts(self) -> None:
        # Strategies that read a checkpoint themselves do so later, and use the names.
        states, self._lora_loaded_states = self._lora_loaded_states, None
        if states is not None and not optimizer_state_names.reads_by_name(self.trainer.strategy):
            optimizer_state_names.match_optimizer_order(self, states)
        if self._trainer is not None:
            self._run_memory().fit_starts(self.trainer)

    def _epoch_starts(self) -> None:
        if self._trainer is not None:
            self._run_memory().epoch_starts(self.trainer)

    def _resume_run(self) -> None:
        if self._trainer is not None:
            self._run_memory().resume(self)

    def _after_save(self, checkpoint: dict[str, Any]) -> None:
        self._run_memory().save(self, checkpoint)
        contents.plain_hyperparameters(checkpoint)
        optimizer_state_names.name_optimizer_states(self, checkpoint)
        if self._has_adapters():
            contents.keep_adapters_only(self, checkpoint, self._base_fingerprint())

    def _before_load(self, checkpoint: dict[str, Any]) -> None:
        use_own_names(self, checkpoint)
        if self._has_adapters():
            contents.check_and_complete(self, checkpoint, self._base_fingerprint(), self.lora_allow_other_base)
        else:
            contents.refuse_adapter(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            optimizer_state_names.refuse_states_by_position(self, checkpoint)
            self._lora_loaded_states = checkpoint.get("optimizer_states")
        self._run_memory().load(checkpoint)
