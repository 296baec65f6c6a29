"""Merging adapters into weights in 4 or 8 bits, and taking them out again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.quantised_weights import dequantised, is_quantised
from tests.support.quantised_models import (
    KINDS,
    ROUNDING,
    ROWS,
    adapted,
    answer,
    difference,
    every_kind,
    merge,
    plain,
    quantised,
    stored,
)
from tests.support.tiny_models import wake


@every_kind
def test_a_merged_layer_computes_what_the_adapter_computed_and_holds_a_plain_weight(kind: str) -> None:
    net = adapted(kind)
    expected = answer(net)
    merge(net)
    assert difference(answer(net), expected) < ROUNDING
    assert not any(is_quantised(parameter) for parameter in net.parameters())
    keys = {f"{name}.{factor}" for name in ("first", "second") for factor in ("lora_A", "lora_B")}
    assert net.state_dict().keys() == plain().state_dict().keys() | keys
    assert not any(net.get_parameter(f"{name}.weight").requires_grad for name in ("first", "second"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_a_merged_weight_has_the_type_the_weight_had_before_and_is_rounded_once(kind: str) -> None:
    net = adapted(kind, torch.bfloat16)
    layer = lora_layers(net)["first"]
    exact = dequantised(layer) + layer.weight_delta()
    with pytest.warns(UserWarning, match="their weights are bfloat16"):
        merge_lora(net)
    assert torch.equal(net.first.weight, exact.to(torch.bfloat16))


def test_eight_bits_do_not_say_what_they_were_and_merge_to_float32() -> None:
    net = adapted("int8", torch.bfloat16)
    expected = net(ROWS.bfloat16())
    merge(net)
    assert net(ROWS.bfloat16()).dtype == torch.bfloat16
    assert difference(net(ROWS.bfloat16()), expected) < 0.03  # a few roundings to 8 bits of mantissa


@every_kind
def test_unmerging_restores_the_quantised_weight_bit_for_bit_however_often(kind: str) -> None:
    net = adapted(kind)
    weights, before, expected = [net.first.weight, net.second.weight], stored(net), answer(net)
    for _ in range(50):
        merge(net)
        assert stored(net) != before
        unmerge_lora(net)
    assert net.first.weight is weights[0]
    assert net.second.weight is weights[1]
    assert stored(net) == before
    assert torch.equal(answer(net), expected)


@every_kind
def test_a_merged_layer_without_its_adapter_is_a_plain_linear(kind: str) -> None:
    net = adapted(kind)
    expected = answer(net)
    merge(net)
    remove_lora(net)
    for layer in (net.first, net.second):
        assert type(layer) is nn.Linear
        assert layer.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    assert difference(answer(net), expected) < ROUNDING
    fresh = plain()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(answer(fresh), answer(net))
    net.load_state_dict(fresh.state_dict())


@every_kind
def test_a_merged_module_is_written_plain_and_the_module_stays_quantised(kind: str, tmp_path: Path) -> None:
    net = quantised(kind)
    inject_lora(net, LoRAConfig(rank=4, targets=["first"]))
    expected, before = answer(net), stored(net)
    # The second layer has no adapter and is quantised all the same.
    with pytest.warns(UserWarning, match=r"the merged model is not quantised: 2 quantised layers were written to .*MB"):
        save_merged(net, tmp_path / "merged")
    assert stored(net) == before
    assert torch.equal(answer(net), expected)
    fresh = plain()
    fresh.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert difference(answer(fresh), expected) < ROUNDING


@every_kind
def test_two_layers_that_share_a_quantised_weight_merge_and_unmerge_as_one(kind: str) -> None:
    net = nn.Sequential(quantised(kind).first, nn.ReLU(), nn.ReLU())
    net[2] = copy.copy(net[0])
    net[2]._parameters = dict(net[0]._parameters)
    assert net[2].weight is net[0].weight
    inject_lora(net, LoRAConfig(rank=4, tied_weights="both"))
    wake(net)
    rows = torch.randn(3, 128)
    expected = net[0](rows), net[2](rows)
    assert torch.equal(*expected)
    merge(net)
    assert difference(net[0](rows), expected[0]) < ROUNDING
    assert difference(net[2](rows), expected[1]) < ROUNDING
    unmerge_lora(net)
    assert net[2].weight is net[0].weight
    assert torch.equal(net[2](rows), expected[1])
