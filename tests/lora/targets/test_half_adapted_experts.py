"""Fused experts of which only one weight is adapted: said with the name that completes them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from lightning_lora import LoRAConfig, TargetNotFoundError, inject_lora, lora_layers
from tests.support.moe_models import COMMON, moe

USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 16}
MODELS = {
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**COMMON, **SHARED})),
    "qwen3_next": lambda: moe("qwen3_next"),
    "deepseek_v3": lambda: moe("deepseek_v3"),
    "llama4": lambda: moe("llama4"),
}


def adapted_experts(model: Any) -> list[list[str]]:
    return [list(layer.lora_specs) for name, layer in lora_layers(model).items() if name.endswith(".experts")]


def targets_of(name: str) -> list[str]:
    # These have no q_proj and others in every layer, or at all.
    return USUAL[4:] if name in ("deepseek_v3", "qwen3_next") else USUAL


@pytest.mark.parametrize("name", MODELS)
def test_the_usual_names_warn_where_they_adapt_half_of_the_experts(name: str) -> None:
    model = MODELS[name]()
    said = r"only one of their two weights: .*experts\.down_proj.*'experts\.gate_up_proj'"
    with pytest.warns(UserWarning, match=said):
        inject_lora(model, LoRAConfig(rank=2, targets=targets_of(name)))
    assert adapted_experts(model) == [["down_proj"]] * len(adapted_experts(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", ["targets", "exclude"])
def test_the_name_that_the_warning_gives_ends_it(name: str, option: str) -> None:
    model, named = MODELS[name](), ["experts.gate_up_proj"]
    targets = targets_of(name) + (named if option == "targets" else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(model, LoRAConfig(rank=2, targets=targets, exclude=named if option == "exclude" else []))
    weights = ["gate_up_proj", "down_proj"] if option == "targets" else ["down_proj"]
    assert adapted_experts(model) == [weights] * len(adapted_experts(model))


@pytest.mark.parametrize("targets", ["all", "experts", ["*.experts.*"]])
def test_whole_experts_do_not_warn(targets: Any) -> None:
    model = moe("qwen3_next")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(model, LoRAConfig(rank=2, targets=targets))
    assert adapted_experts(model) == [["gate_up_proj", "down_proj"]] * 2


def test_names_that_no_layer_has_are_refused_with_those_of_the_experts() -> None:
    with pytest.raises(TargetNotFoundError, match=r"'gate_proj' matches none of .*gate_up_proj"):
        inject_lora(moe("qwen3_moe"), LoRAConfig(rank=2, targets=USUAL))
