"""Pure functions on log-probabilities of tokens, ``(rows, tokens)``.

- `policy_loss`: importance-weighted, clipped and sequence-level policy losses; the correction for the sampler.
- `advantages`: rewards compared within their group; generalised advantage estimates; the loss of values.
- `kl`: estimates of the divergence from a reference.
- `head_logprobs`: these log-probabilities, and entropies, out of an output layer.
- `preference_loss`: losses of pairs, on log-probabilities (DPO and its relatives) and on scores (reward models).
"""
