"""Which architectures keep packed examples apart, as their logits say; `docs/packing.md` lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.tasks.packing_check import check_packing
from tests.architectures.decoders import GROUPED, SHAPE
from tests.support import tiny_models
from tests.support.moe_models import moe

NARROW: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS: dict[str, Any] = {"mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}


def build(name: str, config: str, settings: dict[str, Any]) -> Callable[[], Any]:
    def model() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**settings)).eval()

    return model


KEEP: dict[str, Callable[[], Any]] = {
    "Llama": tiny_models.llama,
    "Llama, eager": lambda: tiny_models.llama(attn_implementation="eager"),
    "Mistral": build("Mistral", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "Qwen3": build("Qwen3", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "Phi-3": build("Phi3", "Phi3Config", GROUPED),
    "Gemma 2": build("Gemma2", "Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "Gemma 3": build("Gemma3", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "GPT-2": tiny_models.gpt2,
    "GPT-NeoX": build("GPTNeoX", "GPTNeoXConfig", SHAPE),
    "GPT-J": build("GPTJ", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "GPT-BigCode": build("GPTBigCode", "GPTBigCodeConfig", GPT),
    **{name: (lambda name=name: moe(name)) for name in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "llama4")},
}
MIX: dict[str, Callable[[], Any]] = {
    "Mamba": build("Mamba", "MambaConfig", NARROW | {"state_size": 4}),
    "Mamba 2": build(
        "Mamba2",
        "Mamba2Config",
        NARROW | {"state_size": 4, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "RWKV": build("Rwkv", "RwkvConfig", NARROW),
    "LFM2": build("Lfm2", "Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "Jamba": build(
        "Jamba",
        "JambaConfig",
        GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    ),
    "Bamba": build(
        "Bamba", "BambaConfig", GROUPED | BLOCKS | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 1}
    ),
    "Falcon-H1": build("FalconH1", "FalconH1Config", GROUPED | BLOCKS | {"mamba_d_ssm": 32, "mamba_n_heads": 4}),
    "RecurrentGemma": build(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        SHAPE | {"num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32, "attention_window_size": 16},
    ),
    "Qwen3-Next": lambda: moe("qwen3_next"),
    "BLOOM": build("Bloom", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": build("Mpt", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "OPT": build("OPT", "OPTConfig", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-OSS": lambda: moe("gpt_oss"),
    "RoBERTa": build("Roberta", "RobertaConfig", SHAPE | {"is_decoder": True}),
}


def probe(model: Any) -> bool:
    def logits(ids: Tensor, **given: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, **given).logits

    return check_packing(model, logits, 64)


@pytest.mark.parametrize("model", KEEP.values(), ids=KEEP)
def test_these_keep_examples_apart(model: Callable[[], Any]) -> None:
    assert probe(model())


@pytest.mark.parametrize("model", MIX.values(), ids=MIX)
def test_these_mix_examples_and_are_refused(model: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"in one row, the logits of two examples change by .* of their size"):
        probe(model())


def test_a_model_without_positions_is_refused_with_the_reason() -> None:
    model = tiny_models.llama()

    def logits(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return model(input_ids=ids, attention_mask=attention_mask).logits

    with pytest.raises(ConfigError, match=r"it does not take position_ids \(.*unexpected keyword argument"):
        check_packing(model, logits, 64)


def test_positions_counted_from_elsewhere_are_refused_though_no_example_sees_another() -> None:
    model = tiny_models.gpt2()
    model.transformer.wpe.weight.data.mul_(0.03)

    def logits(ids: Tensor, position_ids: Tensor | None = None, **given: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=None if position_ids is None else position_ids + 1, **given).logits

    with pytest.raises(ConfigError, match=r"change by \d\.\de-02 and "):
        check_packing(model, logits, 64)


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    model = tiny_models.llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="change by nan and nan"):
        probe(model)
