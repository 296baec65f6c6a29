"""LoRA for a LightningModule that you cannot edit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.class_swap import mix_in
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.trainer_access import found


class LoRA(Callback):
    """Adapts any LightningModule, as if it had been written with `LoRAMixin`.

    The class of the module object is replaced by one with ``LoRAMixin`` in front of it, so injection, adapter-only
    checkpoints and checks are those of the mixin. Optimizers keep the learning rates that the module gives them: a rate
    meant for full fine-tuning is about ten times too low for adapters.

    Args:
        config: Layers to adapt and how, as a `LoRAConfig` or a mapping of its fields. None: every layer, at rank 32.
        root: Dotted name of the submodule to adapt; everything outside it is frozen, unless ``trainable`` names it by
            its name in the module. None: the whole module.
        allow_other_base: Load checkpoints even if their adapters were trained on other base weights.

    Raises:
        ConfigError: If the module is a LoRAMixin with other settings, a callback before this one averages weights, or
            one of the trainer would change the base.
    """

    def __init__(
        self,
        config: LoRAConfig | dict[str, Any] | None = None,
        root: str | None = None,
        allow_other_base: bool = False,
    ) -> None:
        self.config = LoRAConfig() if config is None else LoRAConfig.from_dict(config)
        self.root = root
        self.allow_other_base = allow_other_base

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the mixin in front of the module's class before ``configure_model`` runs."""
        if isinstance(pl_module, LoRAMixin):
            if pl_module.lora != self.config:
                raise ConfigError(
                    f"{type(pl_module).__name__} has LoRA settings of its own: change those, or drop the callback."
                )
            return
        first = found(trainer, LoRA, WeightAveraging)
        if isinstance(first, WeightAveraging):
            name = type(first).__name__
            raise ConfigError(f"{name} copies the module before it has adapters: put LoRA before {name}.")
        module = mix_in(pl_module, LoRAMixin)
        module.lora, module.lora_root = self.config, self.root
        module.lora_allow_other_base = self.allow_other_base
