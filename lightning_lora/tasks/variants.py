"""The same module with another method: LoRA with other settings, on a quantised base, or full fine-tuning."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule

from lightning_lora.errors import TaskSettingError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.class_swap import mix_in
from lightning_lora.memory.building import trainers_of
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.tasks.pretrained import PretrainedTask


def variant(module: LightningModule, lora: LoRAConfig | None, quantization: str | None = None) -> LightningModule:
    """An unbuilt module like ``module`` that trains by another method; ``module`` is left as it is.

    Args:
        module: A task of this package, a module with `LoRAMixin`, or any LightningModule, not adapted yet. Modules that
            are no tasks share their weights with the result: trace it, do not train it.
        lora: LoRA settings; None for full fine-tuning.
        quantization: ``"nf4"`` or ``"int8"`` for the base of a task; None for weights as they are stored.

    Raises:
        ConfigError: If the module is adapted already or cannot be quantised, or a setting is refused.
    """
    if isinstance(module, PretrainedTask):
        return _task(module, lora, quantization)
    if quantization is not None:
        raise TaskSettingError(
            f"quantization={quantization!r} loads the base of CausalLM or SequenceClassifier in fewer bits; "
            f"{type(module).__name__} builds its own layers: leave it null."
        )
    if lora_layers(module):
        raise TaskSettingError(
            f"{type(module).__name__} is adapted already: give the module before configure_model ran."
        )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    memo |= {id(trainer): None for trainer in trainers_of(module)}
    made = copy.deepcopy(module, memo)
    if isinstance(made, LoRAMixin):
        made.lora = lora
    elif lora is not None:
        mixed = mix_in(made, LoRAMixin)
        mixed.lora = LoRAConfig.from_dict(lora)
    return made


def _task(module: PretrainedTask, lora: LoRAConfig | None, quantization: str | None) -> PretrainedTask:
    settings = {name: value for name, value in module.hparams_initial.items() if not name.startswith("_")}
    settings |= {"lora": lora, "quantization": quantization}
    return type(module)(**settings)
