"""Dense decoders."""

from __future__ import annotations

from typing import Any

from tests.architectures.entry import HEAD, POSITIONS, TABLE, TIED, UNCALLED, VOCAB, Architecture, hugging_face, tokens

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
LLAMA_LIKE = {"*.embed_tokens.*": TABLE, "lm_head.*": HEAD}

DECODERS = [
    Architecture(
        "Llama",
        "dense decoder",
        hugging_face("LlamaForCausalLM", "LlamaConfig", **GROUPED),
        tokens(),
        left_out=LLAMA_LIKE,
    ),
    Architecture(
        "Qwen3",
        "dense decoder",
        hugging_face("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
        tokens(),
        left_out=LLAMA_LIKE,
    ),
    Architecture(
        "Gemma 3 (text)",
        "dense decoder",
        hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=8),
        tokens(),
        left_out={"*.embed_tokens.*": TIED},
    ),
    Architecture(
        "Phi-3 (fused qkv and gate)",
        "dense decoder",
        hugging_face("Phi3ForCausalLM", "Phi3Config", **GROUPED),
        tokens(),
        left_out=LLAMA_LIKE,
    ),
    Architecture(
        "GPT-2 (transposed linears)",
        "dense decoder",
        hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            bos_token_id=1, eos_token_id=2,
        ),
        tokens(),
        left_out={"*.wte.*": TIED, "*.wpe.*": POSITIONS},
    ),
    Architecture(
        "GPT-NeoX",
        "dense decoder",
        hugging_face("GPTNeoXForCausalLM", "GPTNeoXConfig", **SHAPE),
        tokens(),
        left_out={"*.embed_in.*": TABLE, "lm_head.*": HEAD},
    ),
    Architecture(
        "OPT",
        "dense decoder",
        hugging_face(
            "OPTForCausalLM", "OPTConfig", vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        ),
        tokens(),
        left_out={"*.embed_tokens.*": TIED, "*.embed_positions.*": POSITIONS},
    ),
    Architecture(
        "Bloom",
        "dense decoder",
        hugging_face(
            "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        tokens(),
        left_out={"*.word_embeddings.*": TIED},
    ),
    Architecture(
        "LFM2 (short convolutions)",
        "dense decoder",
        hugging_face(
            "Lfm2ForCausalLM",
            "Lfm2Config",
            **GROUPED,
            conv_L_cache=3,
            block_multiple_of=8,
            layer_types=["conv", "full_attention"],
        ),
        tokens(),
        left_out={"*.embed_tokens.*": TIED, "*.conv.conv.*": UNCALLED},
    ),
    Architecture(
        "Mamba",
        "state space",
        hugging_face(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2,
            expand=2, time_step_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        tokens(),
        left_out={"*.embeddings.*": TIED, "*.A_log": "decay rates", "*.conv1d.*": UNCALLED, "*.dt_proj.*": UNCALLED},
        exclude={"dt_proj": UNCALLED},
        peft="no: PEFT refuses out_proj of Mamba models",
    ),
]  # fmt: skip
