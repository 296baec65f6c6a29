"""LoRA arithmetic on tensors, without modules.

Read in this order: `update` (the formulas), `fused_linear` (one differentiable function for a layer or a group of
siblings), `compiled_linear` (the same for a compiler), `linear_group` (its tensors and settings), `factor_copies` (its
factors in the type of the input),
`linear_products` (its products and gradients), `narrow_products` (products with a thin side), `gated_input` (computing
``silu(gate) * up`` again), `seeded_dropout`, `expert_rows` (products of experts, grouped and looped), `experts` (their
formulas) and `fused_experts`, `spectrum` (singular values of an update), `sketched_svd` (singular vectors of a
gradient), `magnitude` (norms and magnitudes of DoRA), `kernels` (fewer passes over memory on a GPU), `torch_internals`
(what torch has no public function for).
"""

from lightning_lora.lora.functional.fused_linear import can_fuse, fused_lora_linears, product_type
from lightning_lora.lora.functional.linear_group import AdaptedWeight
from lightning_lora.lora.functional.linear_products import base_product
from lightning_lora.lora.functional.magnitude import magnitude_ratio, rescaled, row_norms
from lightning_lora.lora.functional.spectrum import effective_rank, singular_values
from lightning_lora.lora.functional.update import (
    embedding_update,
    linear_update,
    merged_weight,
    rounding_loss,
    weight_update,
)

__all__ = [
    "AdaptedWeight",
    "base_product",
    "can_fuse",
    "effective_rank",
    "embedding_update",
    "fused_lora_linears",
    "linear_update",
    "magnitude_ratio",
    "merged_weight",
    "product_type",
    "rescaled",
    "rounding_loss",
    "row_norms",
    "singular_values",
    "weight_update",
]
