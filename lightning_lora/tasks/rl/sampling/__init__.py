"""Completions of prompts with their log-probabilities.

- `samples.py`: what is asked of a sampler and what it returns.
"""
