"""Random models that are built in milliseconds, and questions that tests ask of any module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from lightning_lora.lora.layers.adapted import factor_parameters

VOCAB = 64
TOKENS = torch.arange(24).reshape(2, 12) * 7 % VOCAB


class Net(nn.Module):
    """Two linear layers and a norm, with names no library uses."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32, dtype=dtype)
        self.norm = nn.LayerNorm(32, dtype=dtype)
        self.second = nn.Linear(32, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def mlp(dtype: torch.dtype | None = None, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(dtype)


def llama_config(**settings: Any) -> LlamaConfig:
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**defaults | settings)


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**settings)).eval()


def llama_classifier(seed: int = 0, **settings: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=3, **settings)).eval()


def gpt2(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "n_positions": 24,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **(defaults | settings))).eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def loss(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, labels=TOKENS).loss


def wake(module: nn.Module, seed: int = 1, size: float = 0.05) -> None:
    """Give both factors of every adapter random values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for factor in factor_parameters(module).values():
        factor.data.copy_(size * torch.randn(factor.shape, generator=generator, device="cpu"))


def state_bytes(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every parameter and buffer, bit for bit."""
    return {name: (tensor.dtype, raw(tensor)) for name, tensor in module.state_dict().items()}


def raw(tensor: Tensor) -> bytes:
    """The bytes of the values; empty for tensors without memory."""
    if tensor.is_meta or is_lazy(tensor):
        return b""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def portrait(module: nn.Module) -> dict[str, Any]:
    """Everything that adapting could change: classes, names, values, trainability and identity of the objects."""
    return {
        "classes": {name: type(child) for name, child in module.named_modules()},
        "modules": {name: id(child) for name, child in module.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in module.named_parameters()},
        "trains": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "attributes": {name: sorted(child.__dict__) for name, child in module.named_modules()},
        "state": state_bytes(module),
    }
