"""Decoders with a mixture of experts."""

from __future__ import annotations

from typing import Any

from tests.architectures.decoders import GROUPED, LLAMA_LIKE
from tests.architectures.entry import ROUTER, UNCALLED, Architecture, hugging_face, tokens

FAMILY = "mixture of experts"
# Enough rows that every expert is chosen.
ROWS = tokens(rows=6, length=16)
FUSED: dict[str, Any] = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HYBRID: dict[str, Any] = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE_LIKE = LLAMA_LIKE | {"*.gate.weight": ROUTER}
SHORT_CONVOLUTION = {"*.conv1d.*": UNCALLED}

EXPERTS = [
    Architecture(
        "Mixtral",
        FAMILY,
        hugging_face("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        ROWS,
        left_out=MOE_LIKE,
    ),
    Architecture(
        "Qwen3-MoE",
        FAMILY,
        hugging_face("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **FUSED, head_dim=8),
        ROWS,
        left_out=MOE_LIKE,
    ),
    Architecture(
        "GPT-OSS (biases, interleaved gate)",
        FAMILY,
        hugging_face(
            "GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=8,
        ),
        ROWS,
        left_out=LLAMA_LIKE | {"*.router.weight": ROUTER, "*.experts.*_bias": "biases, one row an expert"},
    ),
    Architecture(
        "DeepSeek-V3 (latent attention)",
        FAMILY,
        hugging_face(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", **GROUPED | {"num_key_value_heads": 4}, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=2, n_shared_experts=1, moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
        ROWS,
        left_out=MOE_LIKE,
    ),
    Architecture(
        "OLMoE",
        FAMILY,
        hugging_face("OlmoeForCausalLM", "OlmoeConfig", **GROUPED, num_experts=4, num_experts_per_tok=2),
        ROWS,
        left_out=MOE_LIKE,
    ),
    Architecture(
        "Qwen3-Next (linear attention)",
        FAMILY,
        hugging_face("Qwen3NextForCausalLM", "Qwen3NextConfig", **GROUPED, **HYBRID),
        ROWS,
        left_out=MOE_LIKE | {"*.shared_expert_gate.weight": ROUTER} | SHORT_CONVOLUTION,
    ),
    Architecture(
        "Qwen3.5-MoE (text)",
        FAMILY,
        hugging_face("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", **GROUPED, **HYBRID),
        ROWS,
        left_out=MOE_LIKE | {"*.shared_expert_gate.weight": ROUTER} | SHORT_CONVOLUTION,
    ),
    Architecture(
        "Llama 4 (text)",
        FAMILY,
        hugging_face(
            "Llama4ForCausalLM", "Llama4TextConfig", **GROUPED, head_dim=8, intermediate_size_mlp=48,
            num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=16,
        ),
        ROWS,
        left_out=LLAMA_LIKE | {"*.router.weight": ROUTER},
    ),
]  # fmt: skip
