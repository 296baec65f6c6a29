"""Settings select layers by role and pattern, and give them rank and alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import ConfigError, LoRAConfig, inject_lora, lora_layers, merge_lora
from tests.support.tiny_models import Net, llama, llama_classifier, mlp, wake


class Shared(nn.Module):
    """One layer object under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(8, 8)
        self.back = self.front

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.relu(self.front(x)))


def test_a_rank_above_a_layer_is_capped_and_told_with_the_cap() -> None:
    module = mlp()
    with pytest.warns(
        UserWarning, match=r"rank 12 is more than 1 of 2 adapted layers can hold.*second \(8\)"
    ) as record:
        report = inject_lora(module, LoRAConfig(rank=12))
    assert record[0].filename == __file__
    assert {name: spec.rank for name, spec in report.layers.items()} == {"first": 12, "second": 8}
    assert lora_layers(module)["second"].lora_A.shape == (8, 32)
    assert report.layers["second"].scale == 32.0 / 8


def test_patterns_set_rank_and_alpha_and_the_first_match_wins() -> None:
    config = LoRAConfig(
        rank=4,
        alpha=16,
        rank_pattern={"layers.0.mlp.up_proj": 1, "*.mlp.*": 2, "up_proj": 3},
        alpha_pattern={"up_proj": 8.0, "*.mlp.*": 5.0},
    )
    with pytest.warns(UserWarning, match="rank_pattern 'up_proj' has no effect: the first match wins"):
        layers = inject_lora(llama(), config).layers
    found = {name.removeprefix("model.layers."): (spec.rank, spec.alpha, spec.scale) for name, spec in layers.items()}
    assert found["0.mlp.up_proj"] == (1, 8.0, 8.0)
    assert found["1.mlp.up_proj"] == (2, 8.0, 4.0)
    assert found["1.mlp.down_proj"] == (2, 5.0, 2.5)
    assert found["1.self_attn.q_proj"] == (4, 16, 4.0)


def test_a_layer_with_its_own_rank_needs_no_warning() -> None:
    inject_lora(mlp(), LoRAConfig(rank=12, rank_pattern={"second": 8}))


def test_targets_are_names_suffixes_or_globs() -> None:
    def names(*targets: str, **settings: Any) -> list[str]:
        return list(inject_lora(llama(), LoRAConfig(rank=2, targets=list(targets), **settings)).layers)

    assert names("q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert names("model.layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    assert len(names("*.mlp.*")) == 6
    assert len(names("*.layers.1.*", exclude=["mlp.up_proj", "*.[qk]_proj"])) == 4
    assert names("lm_head", "embed_tokens") == ["model.embed_tokens", "lm_head"]


def test_head_and_embeddings_are_adapted_on_request_only() -> None:
    assert len(inject_lora(llama(), LoRAConfig(rank=2)).layers) == 14
    report = inject_lora(llama(), LoRAConfig(rank=2, adapt_head=True))
    assert report.layers["lm_head"].role == "head"
    assert len(report.layers) == 15
    report = inject_lora(llama(), LoRAConfig(rank=2, adapt_embeddings=True, targets="attention"))
    assert report.layers["model.embed_tokens"].role == "embedding"
    assert len(report.layers) == 9


def test_exclusion_beats_a_request() -> None:
    config = LoRAConfig(rank=2, adapt_head=True, exclude=["lm_head", "layers.0.mlp.up_proj"])
    with pytest.warns(UserWarning, match=r"without an effect .* adapt_head \(lm_head is excluded\)"):
        report = inject_lora(llama(), config)
    assert "lm_head" not in report.layers
    assert report.skipped["lm_head"] == report.skipped["model.layers.0.mlp.up_proj"] == "excluded"
    assert report.skipped["model.embed_tokens"] == "embedding, not targeted"


def test_a_tied_head_and_its_embedding_are_left_alone_by_default() -> None:
    report = inject_lora(llama(tie_word_embeddings=True), LoRAConfig(rank=2))
    assert len(report.layers) == 14


def test_trainable_modules_learn_in_full_and_have_no_adapter() -> None:
    model = llama_classifier()
    report = inject_lora(model, LoRAConfig(rank=2, targets="all", trainable=["score", "layers.1.mlp"]))
    assert report.trainable == ("score", "model.layers.1.mlp")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{name}.lora_{side}" for name in report.layers for side in "AB"}
    whole = {"score.weight"} | {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert trains == factors | whole
    assert report.skipped["model.layers.1.mlp.up_proj"] == "trained in full"
    assert len(report.layers) == 11


def test_a_module_under_two_names_is_adapted_counted_and_merged_once() -> None:
    module = Shared()
    report = inject_lora(module, LoRAConfig(rank=2))
    assert list(report.layers) == ["front"]
    assert report.parameters.adapter == 2 * (8 + 8)
    assert report.parameters.total == 8 * 8 + 8 + 2 * (8 + 8)
    wake(module)
    x = torch.randn(3, 8)
    weight = module.front.weight.detach().clone()
    expected = module(x)
    merge_lora(module)
    layer = lora_layers(module)["front"]
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.front.weight - weight, layer.lora_spec.scale * layer.lora_B @ layer.lora_A)


def test_the_report_says_what_was_done() -> None:
    text = str(inject_lora(llama_classifier(), LoRAConfig(rank=2, rank_pattern={"up_proj": 4}, trainable=["score"])))
    assert "14 layers adapted (8 attention, 6 mlp), rank 2 to 4" in text
    assert "1 embedding, not targeted" in text
    assert "trained in full: score" in text


def test_settings_may_be_a_mapping() -> None:
    module = Net()
    assert list(inject_lora(module, {"rank": 2, "targets": ["first"]}).layers) == ["first"]  # pyright: ignore
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        inject_lora(mlp(), {"rnak": 2})  # pyright: ignore


def test_a_norm_whose_weight_is_read_directly_is_no_concern_of_adapters() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(nn.functional.layer_norm(x, (8,), self.norm.weight))

    assert list(inject_lora(Reading(), LoRAConfig(rank=2)).layers) == ["linear"]
