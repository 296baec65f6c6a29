"""LightningModules ready to run."""

from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.sequence_classifier import SequenceClassifier

__all__ = ["CausalLM", "SequenceClassifier"]
