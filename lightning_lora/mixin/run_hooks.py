"""What the mixin does in the hooks of a run, around what the module itself does there.

Fabric calls hooks too. There is no Trainer then, and nothing to do but to adapt the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_lora.checkpoints import contents
from lightning_lora.checkpoints.optimizer_state_names import name_optimizer_states
from lightning_lora.checkpoints.resume import RunMemory
from lightning_lora.checkpoints.wrapped_names import use_own_names
from lightning_lora.lightning_private import attached_trainer, follow_loaders
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.mixin import gradient_start, optim, rate_search, rates
from lightning_lora.mixin.kept_frozen import KeptFrozen
from lightning_lora.mixin.lightning_callbacks import keep_averages_exact
from lightning_lora.mixin.no_batches import refuse_no_batches
from lightning_lora.mixin.row_order import tell_of_rows
from lightning_lora.trainer_access import attach_when_saving

# The class imports this file.
LoRAMixin = Any


def run_memory(module: LoRAMixin) -> RunMemory:
    """What the module remembers of its run for an exact resume."""
    # The LoRA callback turns an existing module into a LoRAMixin, whose __init__ never ran.
    return module.__dict__.setdefault("_lora_run_memory", RunMemory())


def _kept_frozen(module: LoRAMixin) -> KeptFrozen:
    return module.__dict__.setdefault("_lora_kept_frozen", KeptFrozen())


def run_starts(module: LoRAMixin) -> None:
    """Before the module is built."""
    trainer = attached_trainer(module)
    if trainer is not None:
        attach_when_saving(trainer)
        follow_loaders(trainer, tell_of_rows)
    run_memory(module).run_starts()


def configured(module: LoRAMixin) -> None:
    """After the module is built: adapt it."""
    module.apply_lora()
    _kept_frozen(module).remember(module)


def fit_starts(module: LoRAMixin) -> None:
    """After ``on_fit_start`` of the module, when checkpoints have been read."""
    if attached_trainer(module) is None:
        return
    if lora_layers(module):
        keep_averages_exact(module.trainer)
    rate_search.use_found_rate(module)
    run_memory(module).fit_starts(module)


def train_starts(module: LoRAMixin) -> None:
    """Before ``on_train_start`` of the module: refuse what would not train, or would train the base."""
    if attached_trainer(module) is None:
        return
    if lora_layers(module):
        optim.check_optimizers(module, module.trainer.optimizers)
        check_not_merged(module, "train")
        rate_search.sweep_in_full_terms(module)
        gradient_start.start_from_first_batches(module, run_memory(module).epoch.before_iterators)
    _kept_frozen(module).training_starts(module)
    rates.report_rates(module, module.trainer)


def resume_run(module: LoRAMixin) -> None:
    """After ``on_train_start`` of the module: go on exactly where a loaded checkpoint was written."""
    if attached_trainer(module) is not None:
        run_memory(module).resume(module)


def epoch_starts(module: LoRAMixin) -> None:
    """After ``on_train_epoch_start`` of the module."""
    if attached_trainer(module) is not None:
        rate_search.use_found_rate(module)
        run_memory(module).epoch_starts(module.trainer)


def fit_ends(module: LoRAMixin) -> None:
    """Before ``on_fit_end`` of the module."""
    if (trainer := attached_trainer(module)) is not None:
        refuse_no_batches(trainer)


def before_step(module: LoRAMixin, optimizer: Optimizer) -> None:
    """After ``on_before_optimizer_step`` of the module."""
    _kept_frozen(module).check()


def after_save(module: LoRAMixin, checkpoint: dict[str, Any]) -> None:
    """After ``on_save_checkpoint`` of the module."""
    run_memory(module).save(module, checkpoint)
    contents.plain_hyperparameters(checkpoint)
    name_optimizer_states(module, checkpoint)
    if lora_layers(module):
        contents.keep_adapters_only(module, checkpoint, module._base_prints())


def before_load(module: LoRAMixin, checkpoint: dict[str, Any]) -> None:
    """Before ``on_load_checkpoint`` of the module."""
    use_own_names(module, checkpoint)
    if lora_layers(module):
        contents.check_and_complete(module, checkpoint, module._base_prints(), module.lora_allow_other_base)
    else:
        contents.refuse_adapter(checkpoint)
    run_memory(module).load(module, checkpoint)


Hook = Callable[..., Any]


def outermost(before: Hook | None = None, after: Hook | None = None) -> Callable[[Hook], Hook]:
    """Wrap a hook so that two functions run once, around the outermost of nested ``super()`` calls."""

    def wrap(hook: Hook) -> Hook:
        inside = f"_lora_inside_{hook.__name__}"

        @functools.wraps(hook)
        def wrapped(self: Any, *args: Any) -> Any:
            if self.__dict__.get(inside):
                return hook(self, *args)
            if before is not None:
                before(self, *args)
            self.__dict__[inside] = True
            try:
                result = hook(self, *args)
            finally:
                self.__dict__[inside] = False
            if after is not None:
                after(self, *args)
            return result

        wrapped.__dict__["keeps_lora"] = True
        return wrapped

    return wrap
