"""A module in a run as it would be with another setting, for a trace of its step; the module itself stays as it is."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_lora.errors import StrategyError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.memory.building import trainers_of
from lightning_lora.mixin.lora_mixin import LoRAMixin


def made_with(module: LightningModule, **settings: Any) -> LightningModule:
    """A module made anew from the hyperparameters that ``module`` has saved, with other ``settings``; not built."""
    saved = {name: value for name, value in module.hparams_initial.items() if not name.startswith("_")}
    return type(module)(**saved | settings)


def with_adapters(module: LoRAMixin) -> LoRAMixin:
    """A copy that gets adapters once it is built, and shares its weights with ``module``: trace it, do not train it."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, memo | {id(trainer): None for trainer in trainers_of(module)})
    made.lora = LoRAConfig()
    return made


def recompute(module: nn.Module) -> None:
    """Let the transformers models in ``module`` compute the activations of their blocks again in the backward pass.

    Raises:
        ConfigError: If there is no such model, or none that can.
    """
    able = [child for child in module.modules() if could_recompute(child)]
    for child in able:
        # Without reentrance, which needs an input that has a gradient: frozen embeddings give none.
        getattr(child, recomputing_method(child))({"use_reentrant": False})
    if not able:
        raise StrategyError(
            f"activation checkpointing: transformers cannot recompute blocks of {type(module).__name__}."
        )


def keep_activations(module: nn.Module) -> None:
    """Undo `recompute`."""
    for child in module.modules():
        if getattr(child, "supports_gradient_checkpointing", False) is True and not could_recompute(child):
            getattr(child, recomputing_method(child, "disable"))()


def recomputing_method(model: Any, change: str = "enable") -> str:
    """The name of the method by which the installed transformers switches activation checkpointing on."""
    # The newer name first: transformers warns of the older one.
    names = f"activation_checkpointing_{change}", f"gradient_checkpointing_{change}"
    return next(name for name in names if hasattr(model, name))


def has_vocabulary(module: LightningModule) -> bool:
    """Whether ``module`` has a transformers model with an output layer over a vocabulary."""
    heads = (getattr(child, "get_output_embeddings", None) for child in module.modules())
    return any(head is not None and head() is not None for head in heads)


def could_recompute(module: Any) -> bool:
    """Whether a transformers model could compute activations again in the backward pass, and does not yet."""
    if getattr(module, "supports_gradient_checkpointing", False) is not True:
        return False
    # The newer name first: transformers warns of the older one.
    newer = getattr(module, "is_activation_checkpointing", None)
    return not (module.is_gradient_checkpointing if newer is None else newer)


def first_rows(batch: Any, num_rows: int, of: int) -> Any:
    """The first rows of a batch of ``of`` rows: of every tensor whose first dimension is the rows."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:num_rows] if tensor.ndim and tensor.shape[0] == of else tensor

    return apply_to_collection(batch, Tensor, cut)
