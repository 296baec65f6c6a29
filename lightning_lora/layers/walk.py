"""Finding the adapted layers of a module."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.patterns import plain_name


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Dotted name to adapted layer, in module order; empty if nothing is adapted.

    Names are those of the plain module, whatever ``torch.compile`` and other wrappers add.
    """
    return {plain_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALayer)}


def factors(layer: LoRALayer) -> tuple[nn.Parameter, nn.Parameter]:
    """The two factors of an adapted layer."""
    return layer.lora_A, layer.lora_B
