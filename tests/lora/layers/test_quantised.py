"""Adapters on layers whose base weight is in 4 or 8 bits."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    BaseMismatchError,
    LoRAConfig,
    TargetNotFoundError,
    count_parameters,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.fingerprint import base_digests, tensor_digest
from lightning_lora.lora.layers import LoRAQuantisedLinear
from lightning_lora.lora.layers.quantised_weights import dequantised, is_quantised, stored_parts
from tests.support.quantised_models import (
    BITSANDBYTES,
    CONFIG,
    KINDS,
    REPACKS,
    ROWS,
    Net,
    adapted,
    bnb,
    difference,
    plain,
    quantised,
    torchao,
    weights_seen,
)
from tests.support.tiny_models import wake

ON_TWO = LoRAConfig(rank=4, targets=["first", "second"])
TELLS = "2 merged layers are no longer quantised: their weights are float32"
# Sums of 128 products in float32, in another order.
ROUNDING = 2e-6

every_kind = pytest.mark.parametrize("kind", KINDS)


def stored(net: nn.Module) -> dict[str, bytes]:
    """Codes and scales of every parameter but the adapters, bit for bit."""
    parts = {}
    for name, parameter in net.named_parameters():
        for index, part in enumerate(stored_parts(parameter)):
            if "lora_" not in name:
                parts[f"{name}/{index}"] = bytes(part.detach().reshape(-1).view(torch.uint8).numpy().data)
    return parts


def merge(net: nn.Module) -> None:
    with pytest.warns(UserWarning, match=TELLS):
        merge_lora(net)


def answer(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(ROWS)


@every_kind
def test_a_fresh_adapter_computes_exactly_what_the_quantised_base_computes(kind: str) -> None:
    net = quantised(kind)
    before = answer(net)
    report = inject_lora(net, ON_TWO)
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
def test_the_values_in_float32_are_those_the_layer_computes_with(kind: str) -> None:
    net = quantised(kind)
    for layer in (net.first, net.second):
        value = dequantised(layer)
        assert value.dtype == torch.float32
        assert value.shape == (layer.out_features, layer.in_features)
        assert difference(value, weights_seen(layer)) < 1e-6
    assert 0.001 < difference(dequantised(net.first), plain().first.weight) < 0.3  # it is quantised, and the same base


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_values_are_not_rounded_to_the_type_of_the_base(kind: str) -> None:
    net = quantised(kind, torch.bfloat16)
    assert difference(dequantised(net.second), weights_seen(net.second)) < 1e-6


@every_kind
def test_training_with_evaluations_moves_adapters_only(kind: str) -> None:
    net = quantised(kind)
    inject_lora(net, ON_TWO)
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
def test_removing_an_adapter_gives_the_quantised_class_back(kind: str) -> None:
    net = quantised(kind)
    classes, before, keys = [type(layer) for layer in net.children()], stored(net), list(net.state_dict())
    inject_lora(net, ON_TWO)
    remove_lora(net)
    assert [type(layer) for layer in net.children()] == classes
    assert list(net.state_dict()) == keys
    assert stored(net) == before


@every_kind
def test_packed_weights_count_with_the_numbers_they_hold(kind: str) -> None:
    net = quantised(kind)
    assert count_parameters(net).total == sum(parameter.numel() for parameter in plain().parameters())
    report = inject_lora(net, ON_TWO)
    assert report.parameters.trainable == 4 * (128 + 64) + 4 * (64 + 96)


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
def test_the_digest_sees_codes_and_scales(kind: str) -> None:
    weight = quantised(kind).first.weight
    before = tensor_digest(weight, exact=True)
    for index in range(len(stored_parts(weight))):
        changed = copy.deepcopy(weight)
        part = stored_parts(changed)[index].view(-1)
        part[:1] = part[:1] + 1
        assert tensor_digest(changed, exact=True) != before, f"part {index}"
    assert tensor_digest(copy.deepcopy(weight), exact=True) == before


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


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_bias_keeps_its_type_whatever_the_input_has(kind: str) -> None:
    net = adapted(kind)
    bias = net.first.bias.detach().clone()
    net.first(ROWS.bfloat16())
    assert net.first.bias.dtype == torch.float32
    assert torch.equal(net.first.bias, bias)


def test_an_evaluation_does_not_repack_the_layers_without_adapter_either() -> None:
    net = quantised("nf4")
    inject_lora(net, LoRAConfig(rank=4, targets=["first"]))
    before, seen = stored(net), weights_seen(net.second.train())
    answer(net.eval())
    net.state_dict()
    assert stored(net) == before
    assert torch.equal(weights_seen(net.second), seen)


@pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
def test_a_weight_that_was_repacked_is_refused() -> None:
    net = quantised("nf4")
    answer(net.eval())
    with pytest.raises(
        TargetNotFoundError, match=r"target 'first' .*: an evaluation on the CPU has repacked its weight"
    ):
        inject_lora(net, LoRAConfig(rank=4, targets=["first"]))


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


class QuantLinear(nn.Module):
    """What GPTQ and AWQ layers look like."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(16, 64, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 64))


def _torchao(config: Any) -> nn.Linear:
    layer = nn.Linear(128, 64)
    torchao.quantize_(layer, config)
    return layer


def _float_in_four_bits() -> nn.Linear:
    layer = bnb.nn.Linear4bit(128, 64)
    layer.weight = nn.Parameter(torch.zeros(64, 128))
    return layer


UNKNOWN = {
    "gptq": (QuantLinear, "QuantLinear stores a quantised qweight, a format that is not supported"),
    "fp8": (lambda: _torchao(torchao.Float8WeightOnlyConfig()), "torchao.quantization.Float8Tensor, a format that is"),
    "activations": (
        lambda: _torchao(torchao.Int8DynamicActivationInt8WeightConfig()),
        "torchao quantises its activations too; only weight-only formats are supported",
    ),
    "int8 training": (lambda: bnb.nn.Linear8bitLt(128, 64), "bitsandbytes quantises its weight anew in each step"),
    "overwritten": (_float_in_four_bits, "its 4-bit weight was replaced by a Parameter without scales"),
    "table": (lambda: bnb.nn.EmbeddingNF4(64, 64).to("cpu"), "its weight is torch.uint8, not floating point"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_quantised_weights_are_refused_by_name(name: str) -> None:
    make, reason = UNKNOWN[name]
    net = nn.ModuleDict({"body": make(), "other": nn.Linear(4, 4)})
    with pytest.raises(TargetNotFoundError, match=r"'body'.* cannot be adapted") as error:
        inject_lora(net, LoRAConfig(rank=2, targets=["body"]))
    assert reason in str(error.value)
    if name != "table":  # embeddings are no target unless asked for
        with pytest.warns(UserWarning, match="1 targeted layers cannot be adapted and stay frozen: body"):
            inject_lora(net, LoRAConfig(rank=2))
        assert list(lora_layers(net)) == ["other"]


def test_the_manifest_names_the_quantised_weights(tmp_path: Path) -> None:
    net = adapted("nf4")
    save_adapter(net, tmp_path)
    layers = json.loads((tmp_path / "lightning_lora.json").read_text())["layers"]
    assert layers["first"]["base"] == tensor_digest(net.first.weight)
    assert CONFIG.rank == layers["first"]["rank"]


def test_a_net_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        net = Net(bnb.nn.Linear4bit, torch.float32)
    inject_lora(net, ON_TWO)
    assert net.first.lora_A.is_meta
    assert isinstance(net.first, LoRAQuantisedLinear)
