"""Adapted layer kinds and the registry that chooses among them."""

from lightning_lora.layers.base import AdapterSpec, LoRALayer, WeightShape
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.layers.registry import register_layer

__all__ = [
    "AdapterSpec",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAQuantisedLinear",
    "WeightShape",
    "register_layer",
]
