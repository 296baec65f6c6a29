"""Preferences and reinforcement learning: losses as pure functions, and what samples and scores completions.

- `functional`: the losses, advantages and divergences on log-probabilities of tokens.
- `sampling`: completions of prompts with their log-probabilities.
- `rewards`: what scores completions, in processes of their own.
"""

from lightning_lora.tasks.rl.functional.advantages import gae, group_advantages
from lightning_lora.tasks.rl.functional.kl import kl_estimate
from lightning_lora.tasks.rl.functional.policy_loss import policy_loss

__all__ = ["gae", "group_advantages", "kl_estimate", "policy_loss"]
