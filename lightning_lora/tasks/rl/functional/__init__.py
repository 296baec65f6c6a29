"""Pure functions on log-probabilities of tokens, ``(rows, tokens)``.

- `head_logprobs`: these log-probabilities, and entropies, out of an output layer.
- `preference_loss`: losses of pairs, on log-probabilities (DPO and its relatives) and on scores (reward models).
"""
