"""Settings that change nothing in the module at hand are named in one warning; the defaults never are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_lora import LoRAConfig, TargetNotFoundError, inject_lora
from tests.support.tiny_models import llama
from tests.support.toys import Net


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 8))


UNUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (Net, {"share_expert_factors": True}, "share_expert_factors (no experts that are stored in one parameter"),
    (Net, {"tied_weights": "untie"}, "tied_weights='untie' (no weight to adapt is shared)"),
    (llama, {"tied_weights": "both"}, "tied_weights='both' (no weight to adapt is shared)"),
    (embedding, {"adapt_embeddings": True, "dropout": 0.5}, "dropout in 0 (the input of an embedding is no number"),
    (embedding, {"adapt_embeddings": True, "init": "orthogonal"}, "init='orthogonal' (embeddings always start by"),
    (llama, {"adapt_head": True, "trainable": ["lm_head"]}, "adapt_head (lm_head is trained in full)"),
    (llama, {"targets": ["q_proj", "v_proj"], "exclude": ["q_proj"]}, "target 'q_proj' (model.layers.0.self_attn"),
]


@pytest.mark.parametrize(("make", "settings", "told"), UNUSED, ids=[str(settings) for _, settings, _ in UNUSED])
def test_a_setting_without_an_effect_is_named_once(
    make: Callable[[], nn.Module], settings: dict[str, Any], told: str
) -> None:
    with pytest.warns(UserWarning, match="settings without an effect on this") as caught:
        inject_lora(make(), LoRAConfig(rank=2, **settings))
    (message,) = {str(each.message) for each in caught}
    assert told in message
    assert len(caught) == 1


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern", "lr_multiplier_pattern"])
def test_a_pattern_after_wider_ones_is_told_to_be_unused(option: str) -> None:
    settings: dict[str, Any] = {option: {"*": 2, "up_proj": 1}}
    with pytest.warns(UserWarning, match=rf"{option} 'up_proj' has no effect: the first match wins"):
        inject_lora(llama(), LoRAConfig(rank=2, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(llama(), LoRAConfig(rank=2, **{option: {"up_proj": 1, "*": 2}}))  # type: ignore[arg-type]


def test_dropout_of_a_head_that_shares_its_update_with_the_embedding_is_no_unused_setting() -> None:
    config = LoRAConfig(rank=2, adapt_embeddings=True, adapt_head=True, tied_weights="both", dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(llama(tie_word_embeddings=True), config)


def test_a_trainable_layer_without_parameters_is_not_suggested_again() -> None:
    with pytest.raises(TargetNotFoundError, match="matches 'act', a GELU without parameters: there is nothing") as told:
        inject_lora(nn.ModuleDict({"act": nn.GELU(), "body": nn.Linear(4, 4)}), LoRAConfig(trainable=["act"]))
    assert "did you mean" not in str(told.value)
    with pytest.raises(TargetNotFoundError, match="matches no module with parameters; did you mean 'body'"):
        inject_lora(nn.ModuleDict({"bodi": nn.GELU(), "body": nn.Linear(4, 4)}), LoRAConfig(trainable=["boddy"]))
