"""LoRA arithmetic on tensors, without modules.

Read in this order: `update` (the formulas), `fused_linear` (one function for a layer or a group of siblings),
`linear_group` (what its two ways share), `linear_products` (the two ways: small products, or merged weights),
`narrow_products` (products with a thin side), `gated_input` (recomputing ``silu(gate) * up``), `seeded_dropout`,
`experts` and `fused_experts`, `spectrum` (singular values of an update).
"""

from lightning_lora.lora.functional.fused_linear import can_fuse, fused_lora_linear, fused_lora_linears
from lightning_lora.lora.functional.linear_group import AdaptedWeight
from lightning_lora.lora.functional.spectrum import effective_rank, singular_values
from lightning_lora.lora.functional.update import (
    embedding_update,
    linear_update,
    merged_weight,
    rounding_loss,
    uniform_bound,
    weight_update,
)

__all__ = [
    "AdaptedWeight",
    "can_fuse",
    "effective_rank",
    "embedding_update",
    "fused_lora_linear",
    "fused_lora_linears",
    "linear_update",
    "merged_weight",
    "rounding_loss",
    "singular_values",
    "uniform_bound",
    "weight_update",
]
