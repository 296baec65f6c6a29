"""LightningModules ready to run.

Read in this order: `pretrained` (what all tasks share), `causal_lm`, `sequence_classifier`, `placement` (onto devices),
`quantised_loading`, `loss_at_head` and `head_loss` (the loss in the place of the output layer), `packing_check`.
"""

from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.sequence_classifier import SequenceClassifier

__all__ = ["CausalLM", "SequenceClassifier"]
