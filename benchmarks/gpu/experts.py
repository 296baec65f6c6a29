"""Experts: ours, expert after expert and all at once, and grouped products as they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.gpu.contenders import floor, launch_step, ours
from benchmarks.gpu.models import batch_of, on_device
from benchmarks.gpu.place import Place, host_milliseconds, milliseconds
from benchmarks.timing import interleave, train_step
from benchmarks.workloads import next_token_loss
from lightning_lora.lora.functional import AdaptedWeight
from lightning_lora.lora.functional.expert_rows import ExpertRows, GroupedRows, LoopedRows
from lightning_lora.lora.functional.fused_experts import fused_expert_linear

REAL = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
TOY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}


def experts(place: Place) -> dict[str, Any]:
    """Qwen3-MoE-30B layers, two of them: ours, and grouped_mm as transformers uses it."""
    config = Qwen3MoeConfig(vocab_size=place.pick(4096, 96), use_cache=False, **place.pick(REAL, TOY))
    base = on_device(place, partial(Qwen3MoeForCausalLM, config), torch.bfloat16)
    batch, found = batch_of(place, 4096, 2, 2048), place.found
    found["implementation"] = getattr(base.config, "_experts_implementation", None)
    trainees = {"floor": floor(base, next_token_loss), "ours": ours(base, next_token_loss, place.pick(128, 32))}
    for name, trainee in trainees.items():
        for _ in range(2):
            train_step(trainee, batch)
        found[f"host ms, {name}"] = host_milliseconds(place, partial(launch_step, trainee, batch), 2)
    times = interleave({n: partial(train_step, t, batch) for n, t in trainees.items()}, place.pick(4, 1), 1)
    for name, phases in times.items():
        found[f"{name}, ms"] = statistics.median(phase.step for phase in phases) * 1e3
    for way, call in _products(place, config, batch.input_ids.numel()).items():
        try:
            found[f"one product, {way}, ms"] = milliseconds(place, call, 5, 2)
            found[f"one product, {way}, host ms"] = host_milliseconds(place, call, 3)
        except Exception as reason:
            found[f"one product, {way}"] = f"failed: {str(reason)[:200]}"
    return found


def _products(place: Place, config: Qwen3MoeConfig, tokens: int, rank: int = 16) -> dict[str, Callable[[], object]]:
    """One product over all experts, forward and backward: ours by each way, and torch's grouped products."""
    E, d, f = config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size
    num_rows = tokens * config.num_experts_per_tok
    counts = torch.full((E,), num_rows // E, device=place.device)
    offsets = counts.cumsum(0).to(torch.int32)
    make = partial(torch.randn, device=place.device, dtype=torch.bfloat16)
    x, W, d_y = make(num_rows, d).requires_grad_(), make(E, f, d) / d**0.5, make(num_rows, f)
    A, B = (make(E, rank, d) / d**0.5).requires_grad_(), (make(E, f, rank) * 0.02).requires_grad_()

    def frozen() -> None:
        torch.autograd.grad(F.grouped_mm(x, W.mT, offs=offsets), x, d_y)

    def written_out() -> None:
        update = F.grouped_mm(F.grouped_mm(x, A.mT, offs=offsets), B.mT, offs=offsets)
        torch.autograd.grad(F.grouped_mm(x, W.mT, offs=offsets) + update, [x, A, B], d_y)

    def ours(rows: ExpertRows) -> None:
        torch.autograd.grad(fused_expert_linear(x, AdaptedWeight(W, None, A, B, 1.0), rows), [x, A, B], d_y)

    return {
        "grouped, frozen": frozen,
        "grouped, with update": written_out,
        "ours, grouped": partial(ours, GroupedRows(offsets)),
        "ours, looped": partial(ours, LoopedRows(counts.tolist())),
    }
