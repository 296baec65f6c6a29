"""Why arms cannot share a batch, or a process: what would make them differ from runs of their own."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.trainer_access import found

TRAINS_BASE = "it trains the base"
RECOMPUTES = "activation checkpointing computes layers again in the backward pass"
CHANGES_BASE = "MergeOnFitEnd changes the base at the end of a run"


class ApartError(ConfigError):
    """A run cannot share its base with others, and must be done alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this arm cannot share its base with other arms: {reason}.")
        self.reason = reason


def why_apart(trainer: Trainer, module: LightningModule) -> str:
    """Why a run cannot share its base with others; "" if it can."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"{type(trainer.strategy).__name__} places the weights itself"
    if found(trainer, MergeOnFitEnd) is not None:
        return CHANGES_BASE
    if getattr(module, "lora", None) is None:
        return TRAINS_BASE
    return ""


def changes_base(name: str) -> str:
    """Why arms cannot share a base of which one changes the frozen weight ``name``."""
    return f"the frozen weight {name} is changed in training, and arms have it in common"


def why_no_rows(root: nn.Module) -> str:
    """Why the rows of several arms cannot go through a base in one batch; "" if nothing speaks against it."""
    for name, module in root.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            return f"batch normalisation ({name}) looks at all rows of a batch"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return f"dropout ({name}) draws from one stream of random numbers for all rows"
        if getattr(module, "gradient_checkpointing", False) and module.training:
            return RECOMPUTES
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return f"{name or 'the module'} is compiled for batches of one arm"
        if hasattr(module._parameters.get("weight"), "SCB") and not isinstance(module, LoRALayer):
            return f"int8 layers ({name}) look for outliers in all rows of a batch"
        if has_capacity := _capacity(module):
            return f"experts of {name or 'the module'} take a part of the tokens of a batch at most ({has_capacity})"
    for name, layer in lora_layers(root).items():
        if layer.lora_dropout:
            return f"lora.dropout ({name}) draws from one stream of random numbers for all rows"
    return ""


def why_not_now(root: nn.Module) -> str:
    """Why a pass cannot be shared just now: something watches the layers of one arm; "" if nothing does."""
    head = output_layer(root)
    for name, module in root.named_modules():
        if not name:
            continue  # it is called by each arm itself
        if any(getattr(module, at) for at in _HOOKS):
            return f"a hook of {name} would see the rows of all arms"
        if module is not head and "forward" in module.__dict__:
            return f"the calls of {name} are watched"
    return ""


def output_layer(root: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model, whose place another computation may take."""
    return getattr(root, "get_output_embeddings", lambda: None)()


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _capacity(module: nn.Module) -> str:
    """The setting that says how many tokens an expert takes; "" if there is none."""
    for name, value in vars(module).items():
        if "capacity" in name and isinstance(value, (int, float)) and value:
            return f"{name} {value}"
    return ""
