"""Adapted layer kinds, and the registry that chooses among them.

Read in this order: `base` (what every adapted layer does), `first_values` (of fresh factors), `class_swap` (how a
module becomes one), `linear`, `siblings` (layers with one input, computed together), `embedding`, `conv`,
`effective_weights` (layers that compute with ``W + scale * B A``), `attention`, `recurrent`, `matrices` (modules of any
kind that hold matrices), `experts` and `expert_weights` (fused weights in the base's own code), `quantised_linear` and
`quantised_weights`, `shared_factors` (layers that share a weight), `registry` (the adapted layer for a module),
`adapted` (finding adapted layers and their factors).
"""

from lightning_lora.lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer, WeightShape
from lightning_lora.lora.layers.conv import LoRAConv, LoRAConvTranspose
from lightning_lora.lora.layers.effective_weights import LoRAEffective
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.lora.layers.recurrent import LoRARecurrent
from lightning_lora.lora.layers.registry import register_layer

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
