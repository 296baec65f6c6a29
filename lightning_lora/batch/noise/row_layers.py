"""Which parameters have gradients that can be told apart by rows, and why others have not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.attention import output_projections
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.layers.shared_factors import LoRATiedHead
from lightning_lora.lora.patterns import plain_name


def row_layers(module: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, list[LoRALayer]]:
    """The adapted linear layers that hold ``parameters``, by name; layers that share factors go by one name.

    Args:
        module: Whose layers these are; its batches have rows in the first dimension.
        parameters: What is trained.

    Raises:
        ConfigError: If a parameter is trained elsewhere, or the module computes in a way that hooks do not see.
    """
    if (reason := _hidden(module)) is not None:
        raise ConfigError(reason)
    users: dict[int, dict[str, LoRALayer]] = defaultdict(dict)
    for name, layer in lora_layers(module).items():
        for factor in layer.lora_factors().values():
            users[id(factor)][name] = layer
    unseen = output_projections(module).keys()
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found: dict[str, list[LoRALayer]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        holders = users[id(parameter)]
        if not holders or not all(_is_seen(layer) and name not in unseen for name, layer in holders.items()):
            name = names.get(id(parameter), "a parameter of the optimizer")
            raise ConfigError(f"{name} has no gradient by rows: only those of adapted linear layers are known.")
        found[next(iter(holders))] = list(holders.values())
    return found


def _is_seen(layer: LoRALayer) -> bool:
    return isinstance(layer, (LoRALinear, LoRAConv1D)) and not isinstance(layer, LoRATiedHead)


def _hidden(module: nn.Module) -> str | None:
    """Why hooks would see nothing or something else, or None."""
    for name, child in module.named_modules():
        if getattr(child, "_orig_mod", None) is not None or child._compiled_call_impl is not None:
            return f"{name or type(child).__name__} is compiled, which passes hooks over."
        if getattr(child, "gradient_checkpointing", False) is True and child.training:
            return f"{name or type(child).__name__} computes again in the backward pass (gradient_checkpointing)."
        if getattr(child, "batch_first", True) is False:
            return f"{name or type(child).__name__} has batch_first=False, so rows are not the first dimension."
    return "the module is compiled, which passes hooks over." if getattr(module, "_compiler_ctx", None) else None
