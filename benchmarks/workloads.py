"""What is trained: models with random weights and one batch of random tokens; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.char_gpt import CharGPT

IGNORED = -100


class Batch(NamedTuple):
    """Token ids and labels ``(rows, tokens)``: of the same positions, not shifted, `IGNORED` where unsupervised."""

    input_ids: Tensor
    labels: Tensor


Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its batch.

    Args:
        about: The architecture, for the report.
        build: The model, randomly initialised from torch's current seed.
        vocab_size: Number of tokens to draw from.
        rows: Of the batch.
        length: Tokens a row.
    """

    about: str
    build: Callable[[], nn.Module]
    vocab_size: int
    rows: int
    length: int

    def batch(self, supervised: float = 1.0, seed: int = 0) -> Batch:
        """Random tokens; of each row the last ``supervised`` share has labels, as answers after a prompt have."""
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(self.vocab_size, (self.rows, self.length), generator=generator)
        labels = input_ids.clone()
        labels[:, : round(self.length * (1 - supervised))] = IGNORED
        return Batch(input_ids, labels)


def next_token_loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token over all positions that have a label, nats: the loss of every contender."""
    output = model(batch.input_ids)
    logits = output if isinstance(output, Tensor) else output.logits
    # As transformers does below float32; the float64 of the reference stays.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


def _llama(**settings: Any) -> nn.Module:
    # Tied as in small Llamas; the cache is for generation.
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, use_cache=False, **settings))


def _llama_28m() -> nn.Module:
    return _llama(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)


def _llama_tiny() -> nn.Module:
    return _llama(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def _qwen3_moe() -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # pyright: ignore[reportCallIssue]  # read by the model, missing in the dataclass
        num_experts=16,
        num_experts_per_tok=2,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def _char_gpt(width: int, num_layers: int, num_heads: int) -> Workload:
    about = f"plain GPT, d {width}, {num_layers} layers, {num_heads} heads, fused qkv"
    return Workload(about, lambda: CharGPT(width, num_layers, num_heads, 96, 256), vocab_size=96, rows=8, length=256)


WORKLOADS = {
    "tiny": Workload("Llama, d 64, 2 layers, for CI", _llama_tiny, vocab_size=96, rows=2, length=32),
    "llama-28m": Workload(
        "Llama, d 512, 8 layers, MLP 1408, 8 heads, tied head", _llama_28m, vocab_size=4096, rows=2, length=512
    ),
    "qwen3-moe": Workload(
        "Qwen3-MoE, d 256, 4 layers, 16 experts of 512, top 2", _qwen3_moe, vocab_size=4096, rows=2, length=512
    ),
    "char-gpt-128": _char_gpt(128, 4, 4),
    "char-gpt-256": _char_gpt(256, 6, 4),
    "char-gpt-384": _char_gpt(384, 6, 6),
}
