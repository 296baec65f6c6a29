"""Adapters of experts (T8): parameters, frozen router, merging, experts without tokens.

    PYTHONPATH=. python studies/experts.py

A Qwen3-MoE with random weights: 8 experts of which a token uses 2, width 64. The laws do not depend on the size. Which
layers learn more in a mixture is studies/layers_experts.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_lora import LoRAConfig, count_parameters, inject_lora, lora_layers, merge_lora
from studies.modules.pages import run_laws

EXPERTS, ACTIVE, WIDTH, INNER, LAYERS, RANK = 8, 2, 64, 64, 2, 8
Line = dict[str, object]


def mixture() -> Qwen3MoeForCausalLM:
    """The model, the same each time."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            moe_intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
            norm_topk_prob=True,
        )
    )


def parameters() -> Iterator[Line]:
    """Adapter parameters of the experts by each rule, against the formula."""
    of_gate_up, of_down = (WIDTH + 2 * INNER), (INNER + WIDTH)
    rules = {
        "rank / active experts": (
            LoRAConfig(rank=RANK, targets="experts"),
            EXPERTS * RANK // ACTIVE * (of_gate_up + of_down),
        ),
        "the whole rank": (
            LoRAConfig(rank=RANK * ACTIVE, targets="experts"),
            EXPERTS * RANK * (of_gate_up + of_down),
        ),
        "the whole rank; outer factor shared": (
            LoRAConfig(rank=RANK, targets="experts", share_expert_factors=True),
            RANK * (WIDTH + EXPERTS * 2 * INNER + EXPERTS * INNER + WIDTH),
        ),
    }
    full = LAYERS * EXPERTS * (2 * INNER * WIDTH + INNER * WIDTH)
    for rule, (config, formula) in rules.items():
        model = mixture()
        inject_lora(model, config)
        found = count_parameters(model).adapter
        yield {"law": "parameters", "case": rule, "found": found, "says": LAYERS * formula}
        yield {"law": "share of full fine-tuning", "case": rule, "found": found / full, "says": ""}
    found = _dense_share(RANK, WIDTH, ACTIVE * INNER)
    yield {"law": "share of full fine-tuning", "case": "a dense MLP of the active size", "found": found, "says": ""}
    # Qwen3-30B-A3B: width 2048, experts of 768, 8 active; each expert is a dense MLP of its own size at rank / 8.
    for case, share in (
        ("30B-A3B; rank 32 / 8 active", _dense_share(4, 2048, 768)),
        ("30B-A3B; rank 32 in a dense MLP of the active size", _dense_share(32, 2048, 8 * 768)),
    ):
        yield {"law": "share of full fine-tuning", "case": case, "found": share, "says": "by formula"}


def _dense_share(rank: int, width: int, inner: int) -> float:
    """Adapter parameters of a gated MLP, whose two first layers are one weight, as a share of its weights."""
    return rank * ((width + 2 * inner) + (inner + width)) / (3 * inner * width)


def after_training() -> Iterator[Line]:
    """What 20 steps on two tokens change, and whether merging changes what the model computes."""
    model = mixture()
    inject_lora(model, LoRAConfig(rank=RANK))
    routers = {name: value.clone() for name, value in model.named_parameters() if name.endswith("mlp.gate.weight")}
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    ids = torch.tensor([[3, 5]] * 4)
    used = _train(model, ids)
    now = dict(model.named_parameters())
    same = all(torch.equal(now[name], value) for name, value in routers.items())
    yield {"law": "the router stays frozen", "case": f"{len(routers)} routers", "found": same, "says": True}
    frozen = all(torch.equal(now[name], value) for name, value in base.items())
    yield {"law": "the base stays frozen", "case": f"{len(base)} weights", "found": frozen, "says": True}
    idle, moved = 0, 0
    for name, layer in lora_layers(model).items():
        if not name.endswith("experts"):
            continue
        number = int(name.split(".")[2])
        for factor, value in layer.lora_factors().items():
            if factor.endswith("lora_B"):
                touched = {expert for expert in range(EXPERTS) if bool(value[expert].any())}
                idle += len(set(range(EXPERTS)) - used[number] - touched)
                moved += len(touched - used[number])
    yield {"law": "experts without tokens keep B = 0", "case": "factors B that moved", "found": moved, "says": 0}
    yield {"law": "experts without tokens keep B = 0", "case": "factors B that stayed", "found": idle, "says": ""}
    everything = torch.arange(64)[None]
    trained = model(everything).logits
    merge_lora(model)
    error = float(((model(everything).logits - trained).abs().max() / trained.abs().max()).detach())
    yield {
        "law": "merging changes nothing",
        "case": "largest relative difference",
        "found": error,
        "says": "below 1e-5",
    }


def _train(model: Qwen3MoeForCausalLM, ids: Tensor) -> dict[int, set[int]]:
    """Train, and return the experts of each layer that had a token in any step."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    used: dict[int, set[int]] = {number: set() for number in range(LAYERS)}
    for _ in range(20):
        out = model(ids, labels=ids, output_router_logits=False)
        routed = model(ids, output_router_logits=True).router_logits
        for number, logits in enumerate(routed or ()):
            used[number] |= set(logits.topk(ACTIVE).indices.flatten().tolist())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return used


def main() -> None:
    """Measure, print the table and write the CSV."""
    run_laws(__doc__, "experts", lambda: (*parameters(), *after_training()), digits=4)


if __name__ == "__main__":
    main()
