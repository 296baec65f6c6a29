"""Magnitudes in modules: what is counted, grown, copied, refused, and what follows a weight that changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    count_parameters,
    inject_lora,
    lora_layers,
    lora_state_dict,
    matched_rank,
)
from lightning_lora.lora.growth import grow_adapters
from tests.lora.layers.dora_layers import Build, built, every_layer, wake

WIDTHS = ["bfloat16", "float32", "float64"]


def test_growing_the_rank_keeps_magnitude_and_function() -> None:
    _, module, x = built("linear")
    wake(module)
    before, magnitude = module(x), lora_state_dict(module)["0.lora_magnitude"].clone()
    grow_adapters(module, {"0": 7})
    assert torch.equal(lora_state_dict(module)["0.lora_magnitude"], magnitude)
    assert lora_state_dict(module)["0.lora_A"].shape == (7, 12)
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)


def test_magnitudes_count_as_adapter_parameters() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 40))

    module = net()
    report = inject_lora(module, LoRAConfig(rank=3, dora=True))
    assert report.parameters.adapter == report.parameters.trainable == 3 * (22 + 50) + 50
    assert report.adapter_bytes == 4 * report.parameters.adapter
    assert sum(count_parameters(module).by_role.values()) == report.parameters.adapter
    # Layer 1 alone has 50 rank + 40 parameters.
    assert matched_rank(net(), ["1"], LoRAConfig(rank=1, dora=True)) == 2


def test_a_frozen_copy_keeps_the_magnitudes_of_its_own_weights() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"student": nn.Sequential(nn.Linear(4, 3)), "teacher": nn.Sequential(nn.Linear(4, 3))})
    module["teacher"].requires_grad_(False)
    x = torch.randn(5, 4)
    before = module["teacher"](x)
    inject_lora(module, LoRAConfig(rank=2, dora=True))
    assert torch.equal(module["teacher"](x), before)
    state = lora_state_dict(module)
    assert torch.equal(state["teacher.0.lora_A"], state["student.0.lora_A"])
    assert not torch.equal(state["teacher.0.lora_magnitude"], state["student.0.lora_magnitude"])


class Tied(nn.Module):
    """An embedding and an output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight


REFUSED: dict[str, tuple[Build, LoRAConfig, str]] = {
    "recurrent": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), LoRAConfig(rank=2, dora=True), r"1 \(LSTM\)"),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 3)),
        LoRAConfig(rank=2, dora=True),
        "ConvTranspose1d",
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        LoRAConfig(rank=2, dora=True),
        r"self_attn \(MultiheadAttention\), self_attn.out_proj",
    ),
    "tied": (
        Tied,
        LoRAConfig(rank=2, dora=True, targets=["embed"], tied_weights="both"),
        "head the update of embed.*'untie'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_without_a_magnitude_are_refused_by_name_and_nothing_changes(case: str) -> None:
    build, config, words = REFUSED[case]
    module = build()
    names, types = list(module.state_dict()), [type(part) for part in module.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=words):
            inject_lora(module, config)
    assert (list(module.state_dict()), [type(part) for part in module.modules()]) == (names, types)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_encoder_layer_without_its_attention_computes_alike_in_every_mode() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inject_lora(module, LoRAConfig(rank=2, dora=True, exclude=["self_attn", "out_proj"]))
    wake(module)
    x = torch.randn(2, 5, 8)
    y = module.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), y, rtol=1e-5, atol=1e-5)


def test_untied_tables_and_heads_have_magnitudes_of_their_own() -> None:
    module = Tied()
    inject_lora(module, LoRAConfig(rank=2, dora=True, targets=["embed", "head"], tied_weights="untie"))
    assert {key: tuple(t.shape) for key, t in lora_state_dict(module).items() if "magnitude" in key} == {
        "embed.lora_magnitude": (6,),
        "head.lora_magnitude": (9,),
    }


def test_dora_is_true_or_false_and_starts_at_the_weights() -> None:
    with pytest.raises(ConfigError, match="dora must be true or false, got 1"):
        LoRAConfig(dora=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="init='pissa' takes a part out of them"):
        LoRAConfig(dora=True, init="pissa")


@every_layer
@pytest.mark.parametrize(("before", "after"), [("float32", "float64"), ("float32", "bfloat16"), ("float64", "float32")])
def test_a_fresh_layer_stays_fresh_when_its_type_changes(name: str, before: str, after: str) -> None:
    base, module, x = built(name, getattr(torch, before))
    dtype = getattr(torch, after)
    base, module = base.to(dtype).requires_grad_(False), module.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(module(x), base(x))
    assert lora_layers(module)["0"].lora_magnitude.dtype == getattr(torch, max(before, after, key=WIDTHS.index))
    wake(module)
    magnitude = lora_state_dict(module)["0.lora_magnitude"].clone()
    torch.testing.assert_close(lora_state_dict(module.double())["0.lora_magnitude"], magnitude.double())


def test_fresh_magnitudes_follow_base_weights_that_are_loaded_later() -> None:
    base, module, x = built("linear", torch.float32)
    other = nn.Sequential(nn.Linear(12, 10))
    assert not module.load_state_dict(other.state_dict(), strict=False).unexpected_keys
    assert torch.equal(module(x), other(x))
    wake(module)
    magnitude = lora_state_dict(module)["0.lora_magnitude"].clone()
    module.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(lora_state_dict(module)["0.lora_magnitude"], magnitude)


def test_a_module_built_without_memory_is_fresh_once_its_weights_are_loaded() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(12, 10))
    inject_lora(module, LoRAConfig(rank=2, dora=True))
    assert module[0].lora_magnitude.is_meta
    module.to_empty(device="cpu")
    lora_layers(module)["0"].reset_parameters()
    base, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(3, 12)
    module.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(module(x), base(x))
