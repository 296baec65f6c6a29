"""Tiny mixtures of experts, one for each way transformers stores and computes fused experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lightning_lora import LoRAConfig, inject_lora
from tests.support.tiny_models import wake

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
QWEN3: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 4, "head_dim": 8}


def _deepseek(**settings: Any) -> PreTrainedModel:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
    both = {**COMMON, "num_key_value_heads": 4, "first_k_dense_replace": 1, **ranks, **groups, **settings}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**both))


def _qwen3_next(**settings: Any) -> PreTrainedModel:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 8}
    shared = {"shared_expert_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{**COMMON, **QWEN3, **linear, **layers, **shared, **settings}))


# Among them: experts with an ordinary gate, with a shared expert, transposed with bias and interleaved gate, behind a
# dense layer, and transposed without a mark that says so.
BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "mixtral": lambda **s: MixtralForCausalLM(MixtralConfig(**{**COMMON, "num_local_experts": 4, **s})),
    "qwen3_moe": lambda **s: Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**COMMON, **QWEN3, **s})),
    "olmoe": lambda **s: OlmoeForCausalLM(OlmoeConfig(**{**COMMON, "num_experts": 4, **s})),
    "gpt_oss": lambda **s: GptOssForCausalLM(GptOssConfig(**{**COMMON, "num_local_experts": 4, "head_dim": 8, **s})),
    "deepseek_v3": _deepseek,
    "qwen3_next": _qwen3_next,
    "llama4": lambda **s: Llama4ForCausalLM(
        Llama4TextConfig(
            **{
                **COMMON,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 24,
                "head_dim": 8,
                **s,
            }
        )
    ),
}


def moe(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of `BUILDERS` with weights of experts large enough to matter; ``settings`` go to its config."""
    torch.manual_seed(seed)
    model = BUILDERS[name](**settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.2)
    return model


def adapted(name: str, **settings: Any) -> Any:
    """`moe` with adapters of rank 4 that look trained."""
    model = moe(name)
    inject_lora(model, LoRAConfig(**{"rank": 4, **settings}))
    wake(model, size=0.1)
    return model
