"""Adapted layer kinds, and the registry that chooses among them.

Read in this order: `base` (what every adapted layer does), `class_swap` (how a module becomes one), `linear`,
`embedding`, `conv`, `attention`, `recurrent`, `experts`, `quantised_linear` and `quantised_weights`,
`effective_weights` (layers that compute with ``W + s B A``), `siblings` (layers that share an input), `shared_factors`
(layers that share a weight), `registry` (from a module to its adapted kind), `adapted` (finding adapted layers and
their factors).
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
