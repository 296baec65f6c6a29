"""Losses on log-probabilities, against closed forms and published numbers."""
