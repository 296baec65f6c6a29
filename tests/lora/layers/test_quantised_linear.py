"""Adapters on linear layers whose base weight is in 4 or 8 bits."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_lora import (
    BaseMismatchError,
    LoRAConfig,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.lora.fingerprint import base_digests, tensor_digest
from lightning_lora.lora.layers import LoRAQuantisedLinear
from lightning_lora.lora.layers.quantised_weights import dequantised, is_quantised
from tests.support.quantised_models import (
    BITSANDBYTES,
    CONFIG,
    ROUNDING,
    ROWS,
    Net,
    adapted,
    answer,
    bnb,
    difference,
    every_kind,
    merge,
    plain,
    quantised,
    stored,
    weights_seen,
)


@every_kind
def test_a_fresh_adapter_computes_exactly_what_the_quantised_base_computes(kind: str) -> None:
    net = quantised(kind)
    before = answer(net)
    report = inject_lora(net, CONFIG)
    assert list(report.layers) == ["first", "second"]
    assert all(isinstance(layer, LoRAQuantisedLinear) for layer in lora_layers(net).values())
    assert torch.equal(answer(net), before)


@every_kind
def test_the_update_is_added_to_what_the_base_computes(kind: str) -> None:
    net = adapted(kind)
    layer = lora_layers(net)["first"]
    base = weights_seen(net.first)
    with disable_lora(net):
        without = weights_seen(net.first)
    update = layer.lora_spec.scale * layer.lora_B @ layer.lora_A
    assert difference(base - without, update) < 1e-5


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@every_kind
def test_factors_have_a_floating_type_never_the_codes(kind: str, dtype: str | None) -> None:
    net = quantised(kind, torch.bfloat16)
    inject_lora(net, LoRAConfig(rank=4, adapter_dtype=dtype))
    found = {factor.dtype for layer in lora_layers(net).values() for factor in (layer.lora_A, layer.lora_B)}
    assert found == {torch.bfloat16 if dtype else torch.float32}


@every_kind
def test_training_with_evaluations_moves_adapters_only(kind: str) -> None:
    net = quantised(kind)
    inject_lora(net, CONFIG)
    before, digests = stored(net), base_digests(net, exact=True)
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert len(learning) == 4
    optimizer = torch.optim.Adam(learning, lr=0.01)
    losses = []
    for _ in range(20):
        loss = (net.train()(ROWS) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        answer(net.eval())
        net.state_dict()
    assert losses[-1] < 0.5 * losses[0]
    assert stored(net) == before
    assert base_digests(net, exact=True) == digests


@every_kind
def test_evaluation_computes_with_the_weights_of_training(kind: str) -> None:
    net = adapted(kind)
    trained = answer(net.train())
    # Evaluating, bitsandbytes' 8-bit layers round their inputs to 8 bits too: half of 1/127 of each row's largest.
    bound = 0.02 if kind == "int8" else 0.0
    assert difference(answer(net.eval()), trained) <= bound


@every_kind
def test_removing_an_adapter_gives_the_quantised_class_back(kind: str) -> None:
    net = quantised(kind)
    classes, before, keys = [type(layer) for layer in net.children()], stored(net), list(net.state_dict())
    inject_lora(net, CONFIG)
    remove_lora(net)
    assert [type(layer) for layer in net.children()] == classes
    assert list(net.state_dict()) == keys
    assert stored(net) == before


@every_kind
def test_a_copy_is_independent_and_computes_the_same(kind: str) -> None:
    net = adapted(kind)
    answer(net)
    other = copy.deepcopy(net)
    assert torch.equal(answer(other), answer(net))
    with torch.no_grad():
        lora_layers(other)["first"].lora_B.zero_()
    assert not torch.equal(answer(other), answer(net))
    merge(other)
    assert is_quantised(net.first.weight)


@pytest.mark.parametrize("kind", BITSANDBYTES)  # torchao's tensors cannot be pickled
@pytest.mark.parametrize("used", [False, True])
def test_a_pickled_layer_comes_back_quantised_though_its_parameter_loses_its_class(kind: str, used: bool) -> None:
    net = adapted(kind)
    if used:
        answer(net)
    layers = pickle.loads(pickle.dumps([net.first, net.second]))
    expected, digests = answer(net), base_digests(net, exact=True)
    net.first, net.second = layers
    assert torch.equal(answer(net), expected)
    assert base_digests(net, exact=True) == digests
    assert all(is_quantised(layer.weight) for layer in layers)
    merge(net)
    assert difference(answer(net), expected) < ROUNDING
    unmerge_lora(net)
    assert torch.equal(answer(net), expected)


@every_kind
def test_an_adapter_goes_to_disk_and_back(kind: str, tmp_path: Path) -> None:
    net = adapted(kind)
    save_adapter(net, tmp_path / "adapter")
    fresh = quantised(kind)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(answer(fresh), answer(net))
    other = plain() if kind == "nf4" else quantised("nf4")
    with pytest.raises(BaseMismatchError, match="2 of its 2 layers have other weights here"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_bias_keeps_its_type_whatever_the_input_has(kind: str) -> None:
    net = adapted(kind)
    bias = net.first.bias.detach().clone()
    net.first(ROWS.bfloat16())
    assert net.first.bias.dtype == torch.float32
    assert torch.equal(net.first.bias, bias)


def test_the_manifest_names_the_quantised_weights(tmp_path: Path) -> None:
    net = adapted("nf4")
    save_adapter(net, tmp_path)
    layers = json.loads((tmp_path / "lightning_lora.json").read_text())["layers"]
    assert layers["first"]["base"] == tensor_digest(net.first.weight)
    assert CONFIG.rank == layers["first"]["rank"]


def test_a_net_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        net = Net(bnb.nn.Linear4bit, torch.float32)
    inject_lora(net, CONFIG)
    assert net.first.lora_A.is_meta
    assert isinstance(net.first, LoRAQuantisedLinear)


@every_kind
def test_pissa_starts_from_the_dequantised_weight_and_leaves_the_codes(kind: str) -> None:
    model = quantised(kind)
    expected = model(ROWS)
    codes = stored(model)
    inject_lora(model, replace(CONFIG, init="pissa"))
    layer = lora_layers(model)["first"]
    singular = torch.linalg.svdvals(dequantised(layer))[:4]
    principal = layer.lora_spec.scale * layer.lora_B[:, :4] @ layer.lora_A[:4]
    assert torch.allclose(torch.linalg.svdvals(principal)[:4], singular, rtol=1e-4)
    assert torch.allclose(model(ROWS), expected, atol=1e-5)
    assert stored(model) == codes
