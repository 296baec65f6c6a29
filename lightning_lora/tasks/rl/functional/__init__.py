"""Pure functions on log-probabilities of tokens, ``(rows, tokens)``."""
