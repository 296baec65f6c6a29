"""The matched rank against parameter counts, made by hand and by injecting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, count_parameters, inject_lora, matched_rank
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, portrait


def test_attention_at_matched_rank_has_as_many_parameters() -> None:
    like = LoRAConfig(rank=4)
    rank = matched_rank(llama(), "attention", like)
    # One layer: q and o (32, 32), k and v (16, 32); gate, up and down (48, 32).
    attention, every = 2 * (32 + 32) + 2 * (32 + 16), 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert rank == round(4 * every / attention)
    model, other = llama(), llama()
    inject_lora(model, like)
    inject_lora(other, LoRAConfig(rank=rank, targets="attention"))
    gap = count_parameters(other).adapter - count_parameters(model).adapter
    assert abs(gap) <= 2 * attention / 2, "within half a rank of every layer"


def test_the_tables_of_lora_without_regret_are_matched_on_a_model_without_memory() -> None:
    # Llama 3.1 8B: attention at rank 256 has about as many parameters as MLP at rank 128.
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256))
    assert matched_rank(model, "attention", LoRAConfig(rank=128, targets="mlp")) == round(128 * 1_769_472 / 851_968)


def test_the_same_targets_match_at_the_same_rank() -> None:
    for rank in (1, 2, 7, 16):
        assert matched_rank(llama(), "all", LoRAConfig(rank=rank)) == rank


def test_experts_count_each_at_their_own_rank() -> None:
    model = moe("qwen3_moe")
    rank = matched_rank(model, "attention", LoRAConfig(rank=4, targets="experts"))
    inject_lora(model, LoRAConfig(rank=4, targets="experts"))
    other = moe("qwen3_moe")
    inject_lora(other, LoRAConfig(rank=rank, targets="attention"))
    per_rank = count_parameters(other).adapter / rank
    assert abs(count_parameters(other).adapter - count_parameters(model).adapter) <= per_rank / 2


def test_what_cannot_be_reached_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"hold [\d,]+ adapter parameters at most, fewer than the [\d,]+ of rank 32"):
        matched_rank(llama(), ["k_proj"], LoRAConfig(rank=32))


def test_nothing_is_changed() -> None:
    model = llama()
    before = portrait(model)
    matched_rank(model, "attention", LoRAConfig(rank=4))
    with pytest.raises(TargetNotFoundError):
        matched_rank(model, "experts", LoRAConfig(rank=4))
    assert portrait(model) == before
