"""LoRA arithmetic on tensors, without modules."""

from lightning_lora.functional.lora import (
    embedding_update,
    linear_update,
    merged_weight,
    uniform_bound,
    weight_update,
)

__all__ = ["embedding_update", "linear_update", "merged_weight", "uniform_bound", "weight_update"]
