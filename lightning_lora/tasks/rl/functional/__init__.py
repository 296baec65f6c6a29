"""Pure functions on log-probabilities of tokens, ``(rows, tokens)``.

- `head_logprobs`: these log-probabilities, and entropies, out of an output layer.
"""
