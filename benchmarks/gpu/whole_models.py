"""A whole adapted Llama against float64, and what must change nothing: siblings, checkpointing, merging and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.contenders import ours
from benchmarks.gpu.models import on_device
from benchmarks.gpu.place import Place, error
from benchmarks.workloads import Batch, next_token_loss
from lightning_lora import lora_layers, merge_lora, unmerge_lora
from lightning_lora.lora.layers.adapted import factor_parameters

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)


def check_whole_model(place: Place, dtype: torch.dtype, limit: float) -> None:
    """Write a row for each law into the notes of ``place``; a law that fails with an error costs its row only."""
    key = f"Llama, {str(dtype).removeprefix('torch.')}"
    model: Any = ours(on_device(place, partial(LlamaForCausalLM, CONFIG), dtype), next_token_loss).model
    ids = torch.randint(96, (4, 65), device=place.device)
    # The second step is the first that knows siblings.
    alone, siblings = gradients(model, ids), gradients(model, ids, steps=2)

    def checkpointed() -> float:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return largest_error(gradients(model, ids, steps=2), siblings)

    def judge(name: str, worst: Callable[[], float], allowed: float) -> None:
        try:
            value = worst()
            place.found[name] = {"worst": value, "allowed": allowed, "ok": bool(value <= allowed)}
        except Exception as reason:
            place.found[name] = {"failed": f"{type(reason).__name__}: {str(reason)[:160]}", "ok": False}

    judge(key, lambda: largest_error(siblings, gradients(in_float64(model), ids)), limit)
    judge(f"{key}: siblings over alone", lambda: largest_error(siblings, alone), limit)
    judge(f"{key}: checkpointing", checkpointed, limit)
    judge(f"{key}: merge and back", lambda: float(not comes_back(model)), 0.0)


def gradients(model: nn.Module, ids: Tensor, steps: int = 1) -> dict[str, Tensor]:
    """Gradients of all factors in the last of several steps without an optimizer."""
    for _ in range(steps):
        model.zero_grad()
        next_token_loss(model, Batch(ids, ids)).backward()
    return {name: p.grad.clone() for name, p in factor_parameters(model).items() if p.grad is not None}


def in_float64(model: nn.Module) -> nn.Module:
    right = copy.deepcopy(model).double()
    for layer in lora_layers(right).values():
        for factor in layer.lora_factors().values():
            factor.data = factor.data.double()
    return right


def largest_error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(error(found[name], right[name]) for name in right)


def comes_back(model: nn.Module) -> bool:
    """Whether merging and unmerging gives every parameter back bit for bit."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    merge_lora(model)
    unmerge_lora(model)
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())
