"""LoRA arithmetic on tensors, and the loss of an output layer, without modules."""

from lightning_lora.functional.fused_linear import can_fuse, fused_lora_linear, fused_lora_linears
from lightning_lora.functional.head_loss import HeadScores, head_loss, head_scores
from lightning_lora.functional.linear_group import AdaptedWeight
from lightning_lora.functional.lora import (
    embedding_update,
    linear_update,
    merged_weight,
    rounding_loss,
    uniform_bound,
    weight_update,
)
from lightning_lora.functional.spectrum import effective_rank, singular_values

__all__ = [
    "AdaptedWeight",
    "HeadScores",
    "can_fuse",
    "effective_rank",
    "embedding_update",
    "fused_lora_linear",
    "fused_lora_linears",
    "head_loss",
    "head_scores",
    "linear_update",
    "merged_weight",
    "rounding_loss",
    "singular_values",
    "uniform_bound",
    "weight_update",
]
