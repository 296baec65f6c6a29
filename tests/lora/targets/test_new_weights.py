"""Weights that no checkpoint holds are trained in full where that is known, and told where it only looks so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

from lightning_lora import InjectionReport, LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from tests.support.tiny_models import TOKENS, llama, llama_classifier, logits, wake

CONFIG = LoRAConfig(rank=2)
FRESH = "the base looks freshly initialised"
NEW = "no checkpoint seems to hold"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def classifier(folder: Path, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def test_a_head_that_the_checkpoint_lacks_is_trained_in_full_and_comes_back(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder)
    report = inject_lora(model, CONFIG)
    assert report.trainable == ("score",)
    assert model.score.weight.requires_grad
    wake(model)
    save_adapter(model, tmp_path / "adapter")
    again = classifier(folder, seed=2)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_it_is_so_inside_another_module_too(folder: Path) -> None:
    module = nn.ModuleDict({"model": classifier(folder)})
    assert inject_lora(module, CONFIG).trainable == ("model.score",)


def test_a_frozen_head_is_saved_all_the_same(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder)
    inject_lora(model, CONFIG)
    wake(model)
    model.score.weight.data.normal_()
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "adapter")
    again = classifier(folder, seed=2)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_head_that_the_checkpoint_holds_stays_as_it_is(tmp_path: Path) -> None:
    llama_classifier().save_pretrained(tmp_path)
    model = classifier(tmp_path)
    report = inject_lora(model, CONFIG)
    assert not report.trainable
    assert NEW not in str(report)


def test_a_head_of_another_size_is_new(tmp_path: Path) -> None:
    llama_classifier().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert inject_lora(model, CONFIG).trainable == ("score",)


def test_a_new_pooler_below_a_new_head_is_trained_too(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert inject_lora(model, CONFIG).trainable == ("bert.pooler", "classifier")


@pytest.mark.parametrize("settings", [{"exclude": ["score"]}, {"adapt_head": True}, {"targets": ["q_proj", "score"]}])
def test_what_the_settings_say_of_a_new_head_is_done_and_told(settings: dict[str, Any], folder: Path) -> None:
    model = classifier(folder)
    report = inject_lora(model, LoRAConfig(rank=2, **settings))
    assert not report.trainable
    assert ("score" in lora_layers(model)) == ("exclude" not in settings)
    assert (
        f'{NEW} score: the weights are random and frozen, and not saved with the adapter; trainable=["score"]'
        in str(report)
    )


def test_a_resized_vocabulary_is_told_and_not_trained_in_full(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(70)
    report = inject_lora(model, CONFIG)
    assert not report.trainable
    assert f"{NEW} lm_head: " in str(report)
    assert model(TOKENS).logits.shape[-1] == 70


def test_a_model_from_a_checkpoint_has_nothing_to_tell(folder: Path) -> None:
    report = inject_lora(LlamaForCausalLM.from_pretrained(folder), CONFIG)
    assert not report.notes


def test_a_random_transformers_model_is_told() -> None:
    assert FRESH in str(inject_lora(llama(), CONFIG))


def pretrained() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(16), nn.Linear(16, 8))
    net(torch.zeros(1, 3, 6, 6))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def told(module: nn.Module) -> InjectionReport:
    return inject_lora(module, LoRAConfig(rank=2, targets=["0"]))


@pytest.mark.parametrize("zero_bias", [False, True])
def test_a_layer_with_the_values_of_a_fresh_one_is_told(zero_bias: bool) -> None:
    net = pretrained()
    head = net[4] = nn.Linear(16, 10)
    if zero_bias:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    text = str(told(net))
    assert f"{NEW} 4: " in text
    assert 'trainable=["4"] trains and saves such a layer in full' in text
    assert FRESH not in text


def test_a_layer_that_is_trained_in_full_is_not_told() -> None:
    net = pretrained()
    net[4] = nn.Linear(16, 10)
    assert not inject_lora(net, LoRAConfig(rank=2, targets=["0"], trainable=["4"])).notes


def test_a_trained_network_has_nothing_to_tell() -> None:
    assert not told(pretrained()).notes


def test_a_base_as_torch_initialises_it_is_told() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    text = str(told(net))
    assert f"{FRESH} (0, 2, 4) and is not saved with the adapter" in text
    assert NEW not in text
