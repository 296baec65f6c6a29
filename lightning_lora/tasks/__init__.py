"""LightningModules that are ready to run.

Read in this order: `pretrained` (what all tasks share), `causal_lm`, `sequence_classifier`, `new_head` (a new output
layer), `optimizer`, `attention` (how attention is computed), `running_mean` (sums of an evaluation), `loading`
(config and weights), `quantised_loading` (in 4 or 8 bits), `placement` (on several devices), `end_of_turn` (where a
model stops, and the tokenizer of a run), `untrained_tokens` (what LoRA cannot learn to write), `loss_at_head`,
`head_loss` and `head_chunks` (the loss in place of the output layer), `supervision` (labels by the token before each),
`variants` (the same module with another method), `by_name` (the task that a checkpoint names), `rl` (preferences and
reinforcement learning).
"""

from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.rl.dpo import DPO
from lightning_lora.tasks.rl.policy_gradient import PolicyGradient
from lightning_lora.tasks.rl.reward_model import RewardModel
from lightning_lora.tasks.sequence_classifier import SequenceClassifier

__all__ = ["DPO", "CausalLM", "PolicyGradient", "RewardModel", "SequenceClassifier"]
