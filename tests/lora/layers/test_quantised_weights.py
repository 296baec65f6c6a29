"""Weights in 4 or 8 bits: the numbers they stand for, and formats that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    TargetNotFoundError,
    count_parameters,
    inject_lora,
    lora_layers,
)
from lightning_lora.lora.fingerprint import tensor_digest
from lightning_lora.lora.layers.quantised_weights import dequantised, stored_parts
from tests.support.quantised_models import (
    BITSANDBYTES,
    CONFIG,
    REPACKS,
    answer,
    bnb,
    difference,
    every_kind,
    plain,
    quantised,
    stored,
    torchao,
    weights_seen,
)


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
def test_packed_weights_count_with_the_numbers_they_hold(kind: str) -> None:
    net = quantised(kind)
    assert count_parameters(net).total == sum(parameter.numel() for parameter in plain().parameters())
    report = inject_lora(net, CONFIG)
    assert report.parameters.trainable == 4 * (128 + 64) + 4 * (64 + 96)


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
