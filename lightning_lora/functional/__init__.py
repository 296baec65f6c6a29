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
from lightning_lora.functional.noise_scale import combine, signal_and_trace
from lightning_lora.functional.row_gradients import adapter_row_gradients, sketch_matrix, weight_row_sketches
from lightning_lora.functional.spectrum import effective_rank, singular_values
from lightning_lora.functional.update_metrics import adam_metric, curvature_along

__all__ = [
    "AdaptedWeight",
    "HeadScores",
    "adam_metric",
    "adapter_row_gradients",
    "can_fuse",
    "combine",
    "curvature_along",
    "effective_rank",
    "embedding_update",
    "fused_lora_linear",
    "fused_lora_linears",
    "head_loss",
    "head_scores",
    "linear_update",
    "merged_weight",
    "rounding_loss",
    "signal_and_trace",
    "singular_values",
    "sketch_matrix",
    "uniform_bound",
    "weight_row_sketches",
    "weight_update",
]
