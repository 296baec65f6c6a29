"""Magnitudes on a quantised base: norms are those of the numbers that its codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_lora import LoRAConfig, inject_lora, lora_layers, lora_state_dict, merge_lora, remove_lora, unmerge_lora
from lightning_lora.lora.layers.quantised_weights import dequantised
from tests.support.quantised_models import ROUNDING, ROWS, bnb, every_kind, quantised

CONFIG = LoRAConfig(rank=4, targets=["first", "second"], dora=True)


@every_kind
@pytest.mark.filterwarnings("ignore:2 merged layers are no longer quantised:UserWarning")
def test_a_quantised_layer_computes_the_formula_and_merges(kind: str) -> None:
    module, base = quantised(kind).train(), quantised(kind).train()
    inject_lora(module, CONFIG)
    expected = base(ROWS)
    assert torch.equal(module(ROWS), expected)
    generator = torch.Generator().manual_seed(2)
    for tensor in lora_state_dict(module).values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    layers: Any = lora_layers(module)
    for name, layer in layers.items():
        x = torch.randn(5, layer.lora_A.shape[1], generator=generator)
        A, B, m = (factor.detach() for factor in layer.lora_factors().values())
        direction = dequantised(layer) + layer.lora_spec.scale * B @ A
        written_out = F.linear(x, m[:, None] * direction / direction.norm(dim=1, keepdim=True), layer.bias).detach()
        atol = ROUNDING * float(written_out.abs().max())
        torch.testing.assert_close(layer(x).detach(), written_out, rtol=0, atol=atol, msg=name)
    y = module(ROWS).detach()
    merge_lora(module)
    torch.testing.assert_close(module(ROWS), y, rtol=0, atol=ROUNDING * float(y.abs().max()))
    unmerge_lora(module)
    assert torch.equal(module(ROWS), y)
    remove_lora(module)
    assert torch.equal(module(ROWS), expected)


def test_a_layer_that_is_quantised_after_injection_stays_fresh() -> None:
    layer, plain = bnb.nn.Linear4bit(128, 64, quant_type="nf4"), torch.nn.Linear(128, 64)
    layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
    module = torch.nn.Sequential(layer)
    inject_lora(module, LoRAConfig(rank=4, targets=["0"], dora=True))
    adapted: Any = lora_layers(module)["0"]
    before = adapted.lora_magnitude.detach().clone()
    module.to("cpu")
    assert not torch.equal(adapted.lora_magnitude, before)
    torch.testing.assert_close(adapted.lora_magnitude.detach(), dequantised(adapted).norm(dim=1), rtol=1e-6, atol=0)
