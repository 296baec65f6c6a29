"""Models built on the device, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.place import Place
from benchmarks.workloads import Batch

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
LLAMAS = {
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "100m": (768, 2048, 12, 12, 12),
    "toy": (64, 128, 2, 4, 2),
}


def llama(place: Place, size: str, layers: int | None = None, vocab: int = 128256) -> nn.Module:
    """A bfloat16 Llama with random frozen weights, of a toy's size in a dry run."""
    hidden, inner, depth, heads, kv_heads = LLAMAS[place.pick(size, "toy")]
    config = LlamaConfig(
        vocab_size=place.pick(vocab, 96),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=place.pick(layers or depth, depth),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
        tie_word_embeddings=size != "8b",
        max_position_embeddings=32768,
    )
    return on_device(place, partial(LlamaForCausalLM, config), torch.bfloat16)


def on_device(place: Place, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(place.device):
            model = build()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def sharing(base: nn.Module) -> nn.Module:
    """A copy that shares the weights themselves; only what is added to it is its own."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo)


def batch_of(place: Place, vocab: int, rows: int, length: int) -> Batch:
    """Random tokens, all supervised."""
    rows, length, vocab = place.pick((rows, length, vocab), (2, 32, 96))
    ids = torch.randint(vocab, (rows, length), device=place.device)
    return Batch(ids, ids.clone())
