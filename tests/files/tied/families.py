"""Tiny models with tied embeddings, built once, and the layers that share the weight in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.support.tiny_models import TOKENS, VOCAB, gpt2, llama

SOUND = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
TOKEN_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    **TOKEN_IDS,
}


def t5(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    sizes["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))


def bart(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BartConfig(max_position_embeddings=32, forced_eos_token_id=None, **SEQ2SEQ)
    return BartForConditionalGeneration(config)


def gemma(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCAB, pad_token_id=0, **sizes, **heads))


def whisper(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    unset: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **unset, **SEQ2SEQ))


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Args:
        build: Builds one from a seed.
        table: The name pattern of the embeddings that it looks tokens up in.
        head: The name pattern of its head.
        layer: The name pattern of other layers to adapt.
    """

    build: Callable[[int], PreTrainedModel]
    table: str
    head: str
    layer: str


FAMILIES = {
    "llama": Family(partial(llama, tie_word_embeddings=True, num_hidden_layers=1), "embed_tokens", "lm_head", "q_proj"),
    "bart": Family(bart, "embed_tokens", "lm_head", "q_proj"),
    "gpt2": Family(partial(gpt2, tie_word_embeddings=True, n_layer=1), "wte", "lm_head", "c_attn"),
    "t5": Family(t5, "embed_tokens", "lm_head", "q"),
    "gemma": Family(gemma, "embed_tokens", "lm_head", "q_proj"),
    "whisper": Family(whisper, "decoder.embed_tokens", "proj_out", "q_proj"),
}


@cache
def _built(name: str, seed: int) -> PreTrainedModel:
    return FAMILIES[name].build(seed).eval()


def model_of(name: str, seed: int = 0) -> Any:
    """A model of the family ``name``; equal seeds give equal weights."""
    return copy.deepcopy(_built(name, seed))


def logits_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """The logits of a model of any family, by itself or in PEFT's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs: dict[str, Any] = {"input_ids": tokens}
    if isinstance(inner, WhisperForConditionalGeneration):
        inputs = {"input_features": SOUND, "decoder_input_ids": tokens}
    elif inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(0)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Logits are equal up to the order of float32 sums."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def train(model: Any, seed: int = 1) -> None:
    """Change everything that trains, as training would; shared parameters change once."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
