"""Numbers of trained parameters from shapes alone: published tables, and real injections."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    LoRAMixin,
    TargetNotFoundError,
    count_parameters,
    inject_lora,
)
from lightning_lora.planning.adapter_sizes import adapter_sizes
from lightning_lora.tasks import CausalLM, SequenceClassifier
from tests.support import toys
from tests.support.moe_models import BUILDERS, moe
from tests.support.tiny_models import gpt2, llama, llama_classifier, mlp

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_1B = {**LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
HEAD = {"adapt_head": True, "tied_weights": "untie"}


def on_meta(**sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def llama_8b() -> nn.Module:
    return on_meta(**LLAMA_8B)


@pytest.fixture(scope="module")
def llama_1b() -> nn.Module:
    return on_meta(**LLAMA_1B, tie_word_embeddings=True, head_dim=64)


def per_rank(module: nn.Module, **settings: Any) -> int:
    return adapter_sizes(module, LoRAConfig(**settings)).parameters(1)


def test_each_rank_of_llama_8b_has_the_published_parameters(llama_8b: nn.Module) -> None:
    mlp, attention, head = 1_769_472, 851_968, 132_352
    assert per_rank(llama_8b, targets="mlp") == mlp
    assert per_rank(llama_8b, targets="attention") == attention
    assert per_rank(llama_8b, targets="mlp", adapt_head=True) == mlp + head
    assert per_rank(llama_8b, adapt_head=True) == 2_753_792


def test_each_rank_of_llama_1b_has_the_published_parameters(llama_1b: nn.Module) -> None:
    mlp, attention, head = 491_520, 212_992, 130_304
    assert per_rank(llama_1b, targets="mlp") == mlp
    assert per_rank(llama_1b, targets="attention") == attention
    # Its head shares the embedding's weight. Both ways to adapt it have as many parameters.
    for tied in ("untie", "both"):
        assert per_rank(llama_1b, targets="mlp", adapt_head=True, tied_weights=tied) == mlp + head
    with pytest.raises(ConfigError, match="shares its weight"):
        adapter_sizes(llama_1b, LoRAConfig(adapt_head=True))


@pytest.mark.parametrize(
    ("targets", "rank", "billions"),
    [("mlp", 256, 0.49), ("attention", 256, 0.25), ("all", 256, 0.70), ("mlp", 128, 0.24)],
)
def test_lora_without_regret_counts_the_head_in_its_table(
    llama_8b: nn.Module, targets: str, rank: int, billions: float
) -> None:
    sizes = adapter_sizes(llama_8b, LoRAConfig(targets=targets, adapt_head=True))
    assert sizes.parameters(rank) / 1e9 == pytest.approx(billions, abs=0.006)
    assert adapter_sizes(llama_8b, LoRAConfig(targets=targets)).parameters(rank) / 1e9 < billions - 0.01


def test_every_expert_of_a_30b_mixture_has_the_rank_over_the_active_experts() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    experts: dict[str, Any] = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "head_dim": 128,
    }
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, vocab_size=151936))
    # gate and up are one matrix of (2 * 768, 2048), down is (2048, 768).
    one = (2048 + 2 * 768) + (768 + 2048)
    found = adapter_sizes(model, LoRAConfig(targets="experts"))
    assert [found.parameters(rank) for rank in (1, 8, 15, 32)] == [48 * 128 * one * rank for rank in (1, 1, 1, 4)]
    attention = 48 * ((2048 + 4096) * 2 + (2048 + 512) * 2)
    assert per_rank(model, targets="attention") == attention
    shared = adapter_sizes(model, LoRAConfig(targets="experts", share_expert_factors=True))
    assert shared.parameters(1) == 48 * (2048 + 128 * 2 * 768 + 128 * 768 + 2048)


MODULES = {
    "llama": llama,
    "gpt2": gpt2,
    "classifier": llama_classifier,
    "plain": mlp,
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 4, 5), nn.GRU(4, 6)),
} | {name: (lambda name=name: moe(name)) for name in BUILDERS}


@pytest.mark.filterwarnings("ignore:.*more than .* adapted layers can hold")
@pytest.mark.filterwarnings("ignore:.*cannot be adapted and stay frozen")
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("rank", [6, 512])
def test_what_is_counted_is_what_an_injection_makes(kind: str, rank: int) -> None:
    module = MODULES[kind]()
    counted = adapter_sizes(module, LoRAConfig(rank=3)).parameters(rank)
    inject_lora(module, LoRAConfig(rank=rank))
    assert count_parameters(module).trainable == counted


@pytest.mark.filterwarnings("ignore:.*more than .* adapted layers can hold")
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"down_proj": 3, "*.1.*": 2}},
        {"trainable": ["lm_head", "*.norm"]},
        {"targets": ["q_proj", "v_proj"], "exclude": ["*.0.*"]},
        {"adapt_head": True, "adapt_embeddings": True},
        {"init": "pissa"},
        {"dora": True, "adapt_embeddings": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_all_settings_count(settings: dict[str, Any]) -> None:
    for rank in (1, 8, 64):
        counted = adapter_sizes(llama(), LoRAConfig(**settings)).parameters(rank)
        module = llama()
        inject_lora(module, LoRAConfig(rank=rank, **settings))
        assert count_parameters(module).trainable == counted


class Wrapped(LoRAMixin, LightningModule):
    """Adapts its body, and trains its head, which is outside, in full."""

    lora_root = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.head = nn.Linear(8, 3)


def test_of_a_lightning_module_its_root_counts_and_what_it_trains_outside() -> None:
    config = LoRAConfig(rank=4, trainable=["head", "norm"])
    module = Wrapped()
    counted = adapter_sizes(module, config).parameters(4)
    module.lora = config
    module.apply_lora()
    assert count_parameters(module).trainable == counted
    assert counted - adapter_sizes(Wrapped(), LoRAConfig(trainable=["norm"])).parameters(4) == 8 * 3 + 3


def test_tasks_are_counted_without_their_weights(llama_folder: Any) -> None:
    task = CausalLM(str(llama_folder), lora=LoRAConfig(rank=4))
    counted = adapter_sizes(task, LoRAConfig()).parameters(4)
    assert task.model is None
    task.configure_model()
    assert count_parameters(task).trainable == counted
    classifier = SequenceClassifier(str(llama_folder), num_labels=3, lora=LoRAConfig(rank=4))
    assert isinstance(classifier.lora, LoRAConfig)
    counted = adapter_sizes(classifier, classifier.lora).parameters(4)
    classifier.configure_model()
    assert count_parameters(classifier).trainable == counted


def test_the_module_stays_as_it_is_and_nothing_is_said() -> None:
    module = toys.Plain()
    before = toys.snapshot(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter_sizes(module, LoRAConfig(rank=512))
    assert toys.same(toys.snapshot(module), before)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_wrong_settings_are_refused_as_an_injection_refuses_them() -> None:
    with pytest.raises(TargetNotFoundError, match="matches none"):
        adapter_sizes(llama(), LoRAConfig(targets="experts"))
    with pytest.raises(ConfigError, match=r"rank must be in \[1, 16\] .* got rank=17"):
        adapter_sizes(llama(), LoRAConfig(rank_pattern={"k_proj": 17}))
    module = llama()
    inject_lora(module, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match="adapted already"):
        adapter_sizes(module, LoRAConfig())
