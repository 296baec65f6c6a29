"""Preferences and reinforcement learning: losses as pure functions, and what samples and scores completions.

- `dpo`: direct preference optimisation; `reference`: what its policy is compared with.
- `reward_model`: a score for answers, learned from preferences.
- `no_dropout`: dropout of a model off.
- `functional`: the losses, advantages and divergences on log-probabilities of tokens.
- `sampling`: completions of prompts with their log-probabilities.
- `rewards`: what scores completions, in processes of their own.
"""

from lightning_lora.tasks.rl.functional.preference_loss import preference_loss, reward_model_loss

__all__ = ["preference_loss", "reward_model_loss"]
