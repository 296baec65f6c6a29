"""Pairs of models, one with our adapters and one with PEFT's, from equal settings and equal tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import nn
from transformers import PreTrainedModel

from lightning_lora import LoRAConfig, inject_lora, lora_state_dict
from lightning_lora.files.adapter.peft_format import PREFIX
from tests.support.tiny_models import gpt2, llama, wake

peft_warnings = [
    # PEFT asks transformers for a deprecated name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    # PEFT sets this itself for GPT-2, layer by layer, and says so each time.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


WITHOUT_MANIFEST = r"has no lightning_lora\.json"
"""The warning of `load_adapter` about a folder that PEFT wrote."""


def without_manifest() -> Any:
    return pytest.warns(UserWarning, match=WITHOUT_MANIFEST)


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}

# Builder of the model, our settings, PEFT's settings.
PAIRS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "all": (llama, {}, {"target_modules": ALL_LINEAR}),
    "all-linear": (llama, {}, {"target_modules": "all-linear"}),
    "attention": (llama, {"targets": "attention"}, {"target_modules": ALL_LINEAR[:4]}),
    "mlp": (llama, {"targets": "mlp"}, {"target_modules": ALL_LINEAR[4:]}),
    **{name: (llama, {"targets": [name]}, {"target_modules": [name]}) for name in ALL_LINEAR},
    "one layer": (
        llama,
        {"targets": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
    ),
    "head": (llama, {"targets": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": (
        llama,
        {"targets": ["q_proj"], "adapt_embeddings": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "rslora": (llama, {"scaling": "rslora"}, {"target_modules": ALL_LINEAR, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "targets": "mlp",
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 8},
            "alpha_pattern": {"down_proj": 5.0, "*.layers.1.*": 48.0},
        },
        {
            "target_modules": ALL_LINEAR[4:],
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 8},
            "alpha_pattern": {"down_proj": 5.0, r"model\.layers\.1\..*": 48.0},
        },
    ),
    "gpt2": (gpt2, {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 embeddings": (
        lambda: gpt2(**UNTIED),
        {"adapt_embeddings": True},
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"]},
    ),
}

every_pair = pytest.mark.parametrize("pair", PAIRS)


def both(pair: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with our adapters and one with PEFT's, with equal tensors."""
    build, ours_settings, theirs_settings = PAIRS[pair]
    ours = build()
    inject_lora(ours, LoRAConfig.from_dict({"rank": 4, **ours_settings}))
    wake(ours)
    theirs = wrapped(build(), **theirs_settings)
    factors = their_factors(theirs)
    state = lora_state_dict(ours)
    assert factors.keys() == state.keys()
    for name, tensor in state.items():
        factors[name].data.copy_(tensor)
    return ours, theirs


def wrapped(model: PreTrainedModel, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | settings)).eval()


def their_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Our name to PEFT's parameter, for every factor of ``model``."""
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in (("embedding_A", "A"), ("embedding_B", "B"), ("A", "A"), ("B", "B")):
            for ending in (f".lora_{theirs}.default.weight", f".lora_{theirs}.default"):
                if name.endswith(ending):
                    found[f"{name.removeprefix(PREFIX).removesuffix(ending)}.lora_{ours}"] = parameter
    return found
