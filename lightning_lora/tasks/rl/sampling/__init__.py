"""Completions of prompts with their log-probabilities.

- `samples`: what is asked of a sampler and what it returns.
"""
