"""Preferences and reinforcement learning: losses as pure functions, and what samples and scores completions.

- `policy`: a model without dropout and its `reference`, what it is compared with.
- `dpo`: direct preference optimisation.
- `reward_model`: a score for answers, learned from preferences; `pair_means`: what both log of pairs.
- `functional`: the losses, advantages and divergences on log-probabilities of tokens.
- `sampling`: completions of prompts with their log-probabilities.
- `rewards`: what scores completions, in processes of their own.
- `policy_gradient`: the task; `policy_settings` checks what it was asked for.
- `policy_model`: log-probabilities and values of sampled tokens by the model that learns; `value_head`.
- `rollout`: sampled completions, and the loader that makes them between steps; `rollout_maker` samples, scores and
  compares, `completions` puts tokens into rows and texts.
- `policy_step`: the losses of a minibatch and what is logged of it; `sampler_mismatch`, `learning_signal`: what would
  spoil a run.
"""

from lightning_lora.tasks.rl.functional.advantages import gae, group_advantages
from lightning_lora.tasks.rl.functional.kl import kl_estimate
from lightning_lora.tasks.rl.functional.policy_loss import policy_loss
from lightning_lora.tasks.rl.functional.preference_loss import preference_loss, reward_model_loss

__all__ = ["gae", "group_advantages", "kl_estimate", "policy_loss", "preference_loss", "reward_model_loss"]
