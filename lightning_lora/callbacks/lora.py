"""LoRA for a LightningModule that you cannot edit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import AdapterStateError, CallbackSettingError, ConfigError, check_arguments
from lightning_lora.lightning_private import call_before_weights_return
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.class_swap import mix_in
from lightning_lora.mixin.given_settings import check_unchanged
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.step_memory import StepMemory
from lightning_lora.trainer_access import found

# Attribute of modules whose mixin, and so whose settings, came from a callback.
_BY_CALLBACK = "_lora_by_callback"


class LoRA(Callback):
    """Adapts any LightningModule, as if it had been written with `LoRAMixin`.

    The class of the module object is replaced by one with ``LoRAMixin`` in front of it, so injection, adapter-only
    checkpoints and checks are those of the mixin. Optimizers keep the learning rates that the module gives them: a rate
    meant for full fine-tuning is about ten times too low for adapters.

    A checkpoint of such a run holds adapters only, which the module's own ``load_from_checkpoint`` cannot read. Read it
    by a Trainer with this callback (``trainer.test(module, ckpt_path=...)``), or by a class with the mixin::

        class Adapted(LoRAMixin, Mine):
            lora = LoRAConfig(rank=16)

        module = Adapted.load_from_checkpoint("last.ckpt")

    A folder of `save_adapter` goes back by ``load_adapter(Mine(...), folder)``.

    Args:
        config: Layers to adapt and how, as a `LoRAConfig` or a mapping of its fields. None: every layer, at rank 32.
        root: Dotted name of the submodule to adapt; everything outside it is frozen, unless ``trainable`` names it by
            its name in the module. None: the whole module.
        allow_other_base: Load checkpoints even if their adapters were trained on other base weights.
        autocast_base: Whether mixed precision (``bf16-mixed``, ``16-mixed``) holds the frozen weights below ``root`` in
            the type that it multiplies in, which takes half of their memory and spares a cast of each in every forward
            pass. Not for a module that relies on float32 weights outside of autocast.
        step_memory: Whether adapted layers keep the products of gates, as a `StepMemory` or a mapping. None: as the
            module says.

    Raises:
        ConfigError: If the module is a LoRAMixin with other settings or is adapted with others already, a second LoRA
            callback has other settings, a callback before this one averages weights, or one of the trainer would
            change the base.
    """

    def __init__(
        self,
        config: LoRAConfig | dict[str, Any] | None = None,
        root: str | None = None,
        allow_other_base: bool = False,
        autocast_base: bool = False,
        step_memory: StepMemory | dict[str, Any] | None = None,
    ) -> None:
        check_arguments(LoRA, locals(), CallbackSettingError)
        self.config = LoRAConfig() if config is None else LoRAConfig.from_dict(config)
        self.root = root
        self.allow_other_base = allow_other_base
        self.autocast_base = autocast_base
        self.step_memory = None if step_memory is None else StepMemory.from_dict(step_memory)
        # The calling process must adapt its module before it takes over what child processes have trained.
        call_before_weights_return(_adapt_as_children_did)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the mixin in front of the module's class before ``configure_model`` runs."""
        self._refuse_another(trainer)
        is_new, name = not isinstance(pl_module, LoRAMixin), type(pl_module).__name__
        first = found(trainer, LoRA, WeightAveraging)
        if is_new and isinstance(first, WeightAveraging):
            averaging = type(first).__name__
            raise AdapterStateError(
                f"{averaging} copies the module before it has adapters: put LoRA before {averaging}."
            )
        self.give_settings(pl_module)
        if is_new and stage == "fit":
            rank_zero_info(
                f"lora: checkpoints of this run hold adapters, not a whole {name}: read them by a Trainer with this "
                f"callback (ckpt_path=...), or by `class Adapted(LoRAMixin, {name}): lora = LoRAConfig(...)` and "
                f"Adapted.load_from_checkpoint. {name}.load_from_checkpoint would miss all other weights."
            )

    def give_settings(self, module: LightningModule) -> None:
        """Put the mixin in front of the class of ``module``, with the settings of this callback.

        Raises:
            ConfigError: If the module is a LoRAMixin with other settings, or adapted with others already.
        """
        if isinstance(module, LoRAMixin):
            self._meet_again(module)
        else:
            self._mix_in(module)
        assert isinstance(module, LoRAMixin)
        if self.step_memory is not None:
            module.step_memory = self.step_memory

    def _mix_in(self, module: LightningModule) -> None:
        mixed = mix_in(module, LoRAMixin)
        mixed.__dict__[_BY_CALLBACK] = True
        mixed.lora, mixed.lora_root = self.config, self.root
        mixed.lora_allow_other_base = self.allow_other_base
        mixed.lora_autocast_base = self.autocast_base

    def _meet_again(self, module: LoRAMixin) -> None:
        """Set the settings of a module that a callback has given the mixin; any other must have the same."""
        if not vars(module).get(_BY_CALLBACK):
            own = None if module.lora is None else LoRAConfig.from_dict(module.lora)
            if (own, module.lora_root) != (self.config, self.root):
                raise AdapterStateError(
                    f"{type(module).__name__} has LoRA settings of its own: change those, or drop the callback."
                )
        before = module.lora, module.lora_root
        module.lora, module.lora_root = self.config, self.root
        try:
            check_unchanged(module)
        except ConfigError:
            module.lora, module.lora_root = before
            raise
        module.lora_allow_other_base = module.lora_allow_other_base or self.allow_other_base
        module.lora_autocast_base = module.lora_autocast_base or self.autocast_base

    def _refuse_another(self, trainer: Trainer) -> None:
        first = found(trainer, LoRA)
        if first is not None and (first.config, first.root) != (self.config, self.root):
            raise AdapterStateError(
                "two LoRA callbacks with different settings: a module has one set of adapters. Keep one of the two; "
                "rank_pattern and alpha_pattern give layers settings of their own."
            )


def _adapt_as_children_did(trainer: Trainer) -> None:
    """Give the module the mixin, which then adapts it when it loads their weights."""
    callback = found(trainer, LoRA)
    if callback is not None and trainer.state.fn == TrainerFn.FITTING:
        callback.setup(trainer, trainer.lightning_module, "fit")
