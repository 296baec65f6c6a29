"""Small random models in the place of those that PEFT's tables name, which only the Hub has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_EXPERTS = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
_BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "max_position_embeddings": 32,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 48))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_DEBERTA = _SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}

# Part of a name in the tables, the first that fits: configuration, its settings.
_CONFIGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("OPT", "OPTConfig", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    ("GPTJ", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    ("GPT2", "GPT2Config", _GPT),
    ("GptOss", "GptOssConfig", _EXPERTS),
    ("Llama4", "Llama4TextConfig", _EXPERTS | {"intermediate_size_mlp": 24}),
    ("Llama", "LlamaConfig", _GROUPED),
    ("qwen2", "Qwen2Config", _GROUPED),
    ("Gemma3", "Gemma3TextConfig", _GROUPED | {"head_dim": 8}),
    ("T5", "T5Config", _T5),
    ("Bart", "BartConfig", _BART),
    ("DebertaV2", "DebertaV2Config", _DEBERTA),
    ("Deberta", "DebertaConfig", _DEBERTA),
    ("Roberta", "RobertaConfig", _SMALL),
    ("Bert", "BertConfig", _SMALL),
)
_AUTO = ("ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration")
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def build(name: str) -> nn.Module:
    """A small model of the kind that a name on the Hub stands for.

    Raises:
        KeyError: If the kind is unknown here.
    """
    leaf = name.rpartition("/")[2]
    known = next(((config, settings) for part, config, settings in _CONFIGS if part.lower() in leaf.lower()), None)
    if known is None:
        raise KeyError(f"no small model is known for {name!r}: add its configuration to {__name__}.")
    ending = next((ending for ending in _AUTO if ending in leaf), "ForCausalLM" if "Model" not in leaf else "")
    if "LMHead" in leaf:
        ending = "ForCausalLM"
    auto = getattr(transformers, _AUTO_CLASSES.get(ending, "AutoModel"))
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, known[0])(**known[1]))
    with torch.no_grad():
        # Weights of experts are drawn too small to matter.
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.2)
    return model.eval()
