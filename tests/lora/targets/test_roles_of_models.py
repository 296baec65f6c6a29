"""Roles of every weight layer in common transformers models."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.targets.roles import module_roles

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LLAMA_LIKE = {
    "*.self_attn.[qkvo]_proj": "attention",
    "*.mlp.*_proj": "mlp",
    "*embed_tokens": "embedding",
    "lm_head": "head",
}

MOE = {"num_key_value_heads": 2, **SIZES, **TOKENS}

# Model class, settings, and glob to role, where the first glob that matches wins.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("LlamaForCausalLM", SIZES | TOKENS | {"num_key_value_heads": 2}, LLAMA_LIKE),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS},
        {"*.attn.c_*": "attention", "*.mlp.c_*": "mlp", "*.w[tp]e": "embedding", "lm_head": "head"},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        SIZES | TOKENS,
        {"*.attention.*": "attention", "*.mlp.*": "mlp", "*.embed_in": "embedding", "*": "head"},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        SIZES | TOKENS,
        {"*.self_attn.*": "attention", "*.mlp.*": "mlp", "*.embed_tokens": "embedding", "lm_head": "head"},
    ),
    "bert": (
        "BertForSequenceClassification",
        SIZES | TOKENS,
        {
            "*.attention.*": "attention",
            "*.intermediate.dense": "mlp",
            "*.layer.?.output.dense": "mlp",
            "*_embeddings": "embedding",
            "bert.pooler.dense": "other",
            "classifier": "head",
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0},
        {
            "*.relative_attention_bias": "embedding",
            "*.SelfAttention.*": "attention",
            "*.EncDecAttention.*": "attention",
            "*.DenseReluDense.*": "mlp",
            "shared": "embedding",
            "*.embed_tokens": "embedding",
            "lm_head": "head",
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        MOE | {"num_local_experts": 4},
        {"*.mlp.experts": "experts", "*.self_attn.*": "attention", "*.embed_tokens": "embedding", "lm_head": "head"},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        MOE | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        {
            "*.mlp.experts": "experts",
            "*.mlp.shared_expert_gate": "router",
            "*.mlp.shared_expert.*_proj": "mlp",
            **LLAMA_LIKE,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        SIZES | {"image_size": 32, "patch_size": 16},
        {"*.attention.*": "attention", "*.mlp.*": "mlp", "classifier": "head", "*.projection": "embedding"},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 1,
            **TOKENS,
        },
        {
            "*_attn.*": "attention",
            "*.fc[12]": "mlp",
            "*.embed_*": "embedding",
            "proj_out": "head",
            "*.conv[12]": "other",
        },
    ),
}


def on_meta(name: str, **settings: Any) -> nn.Module:
    kind, defaults, _ = ARCHITECTURES[name]
    model_type = getattr(transformers, kind)
    with torch.device("meta"):
        return model_type(model_type.config_class(**defaults | settings))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_layer_has_its_role(name: str) -> None:
    model = on_meta(name)
    expected = ARCHITECTURES[name][2]
    roles = module_roles(model)
    for module, role in roles.items():
        told = next((value for glob, value in expected.items() if fnmatchcase(module, glob)), None)
        assert role == told, f"{module} is {role}, expected {told}"
    unused = [glob for glob in expected if not any(fnmatchcase(module, glob) for module in roles)]
    assert not unused, f"the model has changed: {unused} match nothing"
    weights = [n for n, m in model.named_modules() if adapter_kind(m) is not None]
    assert set(weights) <= set(roles)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "t5"])
def test_all_adapts_every_layer_but_head_embedding_and_router(name: str) -> None:
    model = on_meta(name)
    wanted = [n for n, role in module_roles(model).items() if role not in ("head", "embedding", "router")]
    inject_lora(model, LoRAConfig(rank=2))
    assert list(lora_layers(model)) == wanted


@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_a_role_adapts_the_layers_of_that_role(targets: str) -> None:
    model = on_meta("llama")
    report = inject_lora(model, LoRAConfig(rank=2, targets=targets))
    assert len(report.layers) == {"attention": 8, "mlp": 6}[targets]
    assert {spec.role for spec in report.layers.values()} == {targets}


def test_a_patch_embedding_is_no_head_where_there_is_none() -> None:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 16}
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, **sizes))
    assert module_roles(model)["embeddings.patch_embeddings"] == "embedding"


def test_a_head_is_one_where_the_base_cannot_be_told() -> None:
    _, settings, _ = ARCHITECTURES["whisper"]
    with torch.device("meta"):
        model = transformers.WhisperForAudioClassification(transformers.WhisperConfig(**settings))
    assert model.base_model is model
    assert {module_roles(model)[name] for name in ("classifier", "projector")} == {"head", "other"}


def test_fused_experts_are_experts_without_memory_too() -> None:
    for name in ("mixtral", "qwen2_moe"):
        report = inject_lora(on_meta(name), LoRAConfig(rank=4, targets="experts"))
        assert {spec.role for spec in report.layers.values()} == {"experts"}
