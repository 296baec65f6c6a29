"""Types of factors and outputs, autocast, and dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_lora, load_lora_state_dict, lora_layers, lora_state_dict
from tests.lora.models import ALL
from tests.support.tiny_models import mlp, wake


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_factors_are_at_least_float32_unless_asked(base: torch.dtype, asked: str | None, expected: torch.dtype) -> None:
    module = mlp(base)
    inject_lora(module, LoRAConfig(rank=4, adapter_dtype=asked))
    wake(module)
    assert {tensor.dtype for tensor in lora_state_dict(module).values()} == {expected}
    y = module(torch.randn(3, 16, dtype=base))
    assert y.dtype == base
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == expected for p in module.parameters() if p.requires_grad)


def test_a_default_dtype_set_by_others_does_not_reach_the_factors() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = mlp(torch.bfloat16)
        inject_lora(module, ALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in lora_state_dict(module).values()} == {torch.float32}


def test_autocast_gives_the_low_type_and_gradients_in_the_wide_one() -> None:
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


def test_float64_is_exact_to_float64() -> None:
    module = mlp(torch.float64)
    inject_lora(module, ALL)
    wake(module)
    x = torch.randn(3, 16, dtype=torch.float64)
    layer = lora_layers(module)["first"]
    expected = x @ (module.first.weight + 32 / 4 * layer.lora_B @ layer.lora_A).T + module.first.bias
    torch.testing.assert_close(module.first(x), expected, rtol=1e-13, atol=1e-13)


def test_dropout_acts_in_training_only() -> None:
    module = nn.Linear(64, 8)
    inject_lora(module, LoRAConfig(rank=4, dropout=0.5))
    wake(module, size=1.0)
    plain = nn.Linear(64, 8)
    plain.load_state_dict(module.state_dict(), strict=False)
    inject_lora(plain, ALL)
    load_lora_state_dict(plain, lora_state_dict(module))
    x = torch.randn(5, 64)
    module.eval()
    assert torch.equal(module(x), plain(x))
    module.train()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
        spread = torch.stack([module(x) for _ in range(400)]).std(0)
    assert ((mean - plain(x)).abs() < 5 * spread / 4000**0.5).all()
