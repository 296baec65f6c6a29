"""Adapted layer kinds and the registry that chooses among them."""

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import AdapterSpec, LoRALayer, WeightShape
from lightning_lora.layers.conv import LoRAConv, LoRAConvTranspose
from lightning_lora.layers.effective import LoRAEffective
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.layers.registry import register_layer

__all__ = [
    "AdapterSpec",
    "LoRAConv",
    "LoRAConv1D",
    "LoRAConvTranspose",
    "LoRAEffective",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRAQuantisedLinear",
    "LoRARecurrent",
    "WeightShape",
    "register_layer",
]
