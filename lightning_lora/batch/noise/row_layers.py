"""Finds the layers whose per-row gradients can be computed, or says why there are none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lightning_lora.errors import MeasurementError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.attention import output_projections
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.dora import DoRALayer
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.layers.shared_factors import LoRATiedHead
from lightning_lora.lora.patterns import plain_name


def row_layers(
    module: nn.Module, parameters: Iterable[nn.Parameter], skips_others: bool = False
) -> dict[str, list[LoRALayer]]:
    """The adapted linear layers that hold ``parameters``, by name. Layers that share factors are one entry.

    Args:
        module: The module being trained; rows are the first dimension of its batches.
        skips_others: Whether to leave out parameters outside of adapted linear layers, instead of raising. Layers with
            a magnitude (dora) are then among the found ones.

    Raises:
        ConfigError: If a parameter is trained outside of adapted linear layers, or hooks do not see the computation.
    """
    if (reason := _hidden_from_hooks(module)) is not None:
        raise MeasurementError(reason)
    holders_of: dict[int, dict[str, LoRALayer]] = defaultdict(dict)
    for name, layer in lora_layers(module).items():
        for factor in layer.lora_factors().values():
            holders_of[id(factor)][name] = layer
    # Attention reads these weights without calling their layers.
    uncalled = output_projections(module).keys()
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found: dict[str, list[LoRALayer]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        holders = holders_of[id(parameter)]
        if not skips_others and any(isinstance(layer, DoRALayer) for layer in holders.values()):
            raise MeasurementError(
                f"per-row gradients do not exist for {next(iter(holders))}, which has a magnitude (dora): set "
                f"accumulate_grad_batches=2 with half the batch."
            )
        if not holders or not all(_is_linear(layer) and name not in uncalled for name, layer in holders.items()):
            if skips_others:
                continue
            name = names.get(id(parameter), "a parameter of the optimizer")
            raise MeasurementError(
                f"per-row gradients exist for adapted linear layers only, and {name} is trained too."
            )
        found[next(iter(holders))] = list(holders.values())
    return found


def _is_linear(layer: LoRALayer) -> bool:
    return isinstance(layer, (LoRALinear, LoRAConv1D)) and not isinstance(layer, LoRATiedHead)


def _hidden_from_hooks(module: nn.Module) -> str | None:
    """Why forward hooks would not see each row of a layer once, or None."""
    for name, child in module.named_modules():
        name = name or type(child).__name__
        if getattr(child, "_orig_mod", None) is not None or child._compiled_call_impl is not None:
            return f"{name} is compiled, which skips forward hooks."
        if getattr(child, "gradient_checkpointing", False) is True and child.training:
            return f"{name} runs its forward pass again in the backward pass (gradient_checkpointing)."
        if getattr(child, "batch_first", True) is False:
            return f"{name} has batch_first=False, so rows are not the first dimension."
    return "the module is compiled, which skips forward hooks." if getattr(module, "_compiler_ctx", None) else None
