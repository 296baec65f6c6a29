"""Preferences and reinforcement learning: losses as pure functions, and what samples and scores completions.

- `functional`: the losses, advantages and divergences on log-probabilities of tokens.
- `sampling`: completions of prompts with their log-probabilities.
- `rewards`: what scores completions, in processes of their own.
"""
