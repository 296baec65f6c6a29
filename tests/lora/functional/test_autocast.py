"""Adapted linear layers under autocast: as exact as PEFT's, in the type autocast says, with one cast of an input."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import LaunchCounter
from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.layers.adapted import factor_parameters

WIDTH, RANK = 192, 16
NAMES = ["q", "k", "v", "o"]


class Block(nn.Module):
    """Three layers with one input, and one of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, False))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * torch.sigmoid(self.k(x)) + self.v(x))


def filled(base: nn.Module, adapt: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """An adapted copy, and its factors by ours names; the same numbers whoever adapts."""
    model, factors = adapt(copy.deepcopy(base))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(factors):
            factor = factors[name]
            factor.copy_(torch.randn(factor.shape, generator=generator) * (0.3 if "lora_B" in name else WIDTH**-0.5))
    return model, factors


def ours(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    inject_lora(model, LoRAConfig(rank=RANK, alpha=RANK))
    return model, factor_parameters(model)


def theirs(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES))  # type: ignore[arg-type]
    named = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    return wrapped, {n.removeprefix("base_model.model.").removesuffix(".default.weight"): p for n, p in named.items()}


def step(model: nn.Module, factors: Mapping[str, nn.Parameter], x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Output, gradient of the input, and gradients of the factors."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for _ in range(2):  # ours computes siblings together once it has seen them
            model(leaf)
        y = model(leaf)
    wanted = [leaf, *(factors[name] for name in sorted(factors))]
    return [y.detach(), *torch.autograd.grad(y.double().square().mean() * 50, wanted)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("base_dtype", [torch.float32, None], ids=["wide base", "base in the type of autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_tensor_is_further_from_float64_than_with_peft(dtype: torch.dtype, base_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    base = Block().requires_grad_(False).to(base_dtype or dtype)
    x = torch.randn(4, 40, WIDTH)
    exact_model, exact_factors = filled(copy.deepcopy(base).double(), ours)
    exact = step(exact_model, exact_factors, x.double(), None)
    found, theirs_found = (step(*filled(base, adapt), x, dtype) for adapt in (ours, theirs))
    assert found[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    for name, mine, other in zip(
        ["y", "x", *sorted(exact_factors)], errors(found, exact), errors(theirs_found, exact), strict=True
    ):
        assert mine <= 1.1 * other, name
        assert mine < 0.05, name


def test_an_input_is_cast_once_for_the_layers_it_goes_to() -> None:
    model, _ = filled(Block().requires_grad_(False).bfloat16(), ours)
    x = torch.randn(4, 40, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x)
        with LaunchCounter() as counter:
            model(x)
    # The input of q, k and v, and nothing else: that of o is in bfloat16, and factors are cast together.
    assert counter.counts["_to_copy"] == 1
    assert counter.counts["_foreach_copy_"] == 1


def test_numbers_that_autocast_leaves_wide_stay_so() -> None:
    model, factors = filled(Block().requires_grad_(False).double(), ours)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float64
    assert len(lora_layers(model)) * 2 == len(factors)
    torch.testing.assert_close(y, model(x))
