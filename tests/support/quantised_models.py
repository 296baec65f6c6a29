"""A small network in every quantised format that can be adapted; needs bitsandbytes and torchao."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_lora, merge_lora
from lightning_lora.lora.layers.quantised_weights import stored_parts
from tests.support.tiny_models import raw, wake

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

KINDS = ("nf4", "nf4-dq", "fp4", "int8", "torchao-int8", "torchao-int4")
BITSANDBYTES = KINDS[:4]
CONFIG = LoRAConfig(rank=4, targets=["first", "second"])
# Sums of 128 products in float32, in another order.
ROUNDING = 2e-6
# Sixty-four columns are one block of scales, 128 are two.
ROWS = torch.randn(6, 128, generator=torch.Generator().manual_seed(5))
every_kind = pytest.mark.parametrize("kind", KINDS)
REPACKS = bnb.functional.has_avx512bf16()


class Net(nn.Module):
    """Two linear layers, quantised, and a plain one that no adapter targets."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = linear(128, 64)
        self.second = linear(64, 96, bias=False)
        self.head = nn.Linear(96, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))))


def plain(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(partial(nn.Linear, dtype=dtype), dtype)


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> Net:
    """`plain` in a format of `KINDS`."""
    base = plain(dtype)
    if kind.startswith("torchao"):
        weight_only: dict[str, Any] = {
            "torchao-int8": torchao.Int8WeightOnlyConfig(),
            "torchao-int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),  # pyright: ignore
        }
        torchao.quantize_(base, weight_only[kind], filter_fn=lambda _, name: name in ("first", "second"))
        return base
    for name in ("first", "second"):
        layer = base.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(base, name, _of_bitsandbytes(layer, kind))
    # Moving it to its device is what quantises it.
    return base.to("cpu")


def _of_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Linear:
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": kind.endswith("dq")}
        made = bnb.nn.Linear4bit(*shape, **options)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=made, **options)
    made.bias = layer.bias
    return made


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> Net:
    """`quantised` with trained-looking adapters on both layers."""
    net = quantised(kind, dtype)
    inject_lora(net, CONFIG)
    wake(net)
    return net


def weights_seen(layer: nn.Module) -> Tensor:
    """The weight a layer computes with, ``(out, in)``, read from its answers alone."""
    features = layer.in_features
    assert isinstance(features, int)
    with torch.no_grad():
        answers = layer(torch.eye(features))
    bias = layer.bias
    return (answers - bias if isinstance(bias, Tensor) else answers).T


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def stored(net: nn.Module) -> dict[str, bytes]:
    """Codes and scales of every parameter but the adapters, bit for bit."""
    parts = {}
    for name, parameter in net.named_parameters():
        for index, part in enumerate(stored_parts(parameter)):
            if "lora_" not in name:
                parts[f"{name}/{index}"] = raw(part)
    return parts


def merge(net: nn.Module) -> None:
    """Merge, with the warning that two layers are plain afterwards."""
    with pytest.warns(UserWarning, match="2 merged layers are no longer quantised: their weights are float32"):
        merge_lora(net)


def answer(net: nn.Module) -> Tensor:
    """Output for `ROWS`, without gradients."""
    with torch.no_grad():
        return net(ROWS)
