"""Completions of prompts with their log-probabilities.

- `samples`: what is asked of a sampler and what it returns.
- `in_process`: the sampler that runs the model that is trained.
- `decoding`: its loop over new tokens.
- `stepping`: one new token of all rows, by a model that keeps keys and values.
- `cache`: keys and values of earlier tokens.
- `drawing`: from logits to tokens and their log-probabilities.
- `stop_texts`: texts that end a completion.
- `vllm`: the sampler that asks a vLLM server.
"""
