"""A gate and its gradients in one pass, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.kernels import gate as kernels
from tests.lora.functional.kernels.under_interpreter.memory import Memory
from tests.lora.functional.kernels.under_interpreter.near import TYPES, assert_rounded_once

ACTIVATIONS = ("silu", "none", "tanh")
SHAPES = {"one row": (1, 7), "one column": (3, 1), "a block": (2, 1024), "two axes, past a block": (2, 3, 1500)}
LAYOUTS = ("contiguous", "halves", "transposed", "every other", "expanded")


def laid_out(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape; large values among them."""
    if layout == "halves":
        gate, up = (torch.randn(*shape[:-1], 2 * shape[-1]) * 3).to(dtype).chunk(2, -1)
        return gate, up
    gate, up = ((torch.randn(shape) * scale).to(dtype) for scale in (6, 1))
    if layout == "transposed":
        return gate.mT.contiguous().mT, up
    if layout == "every other":
        return gate, up.repeat_interleave(2, -1)[..., ::2]
    return gate, up[..., :1].expand(shape) if layout == "expanded" else up


def right(activation: str, gate: Tensor, up: Tensor, d_x: Tensor) -> list[Tensor]:
    """Product and gradients, by autograd in float64."""
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    x = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=activation)) * up
    return [x.detach(), *torch.autograd.grad(x, [gate, up], d_x.double())]


def check(kernels: Any, memory: Memory, activation: str, gate: Tensor, up: Tensor, product: bool, halves: bool) -> None:
    """Of a module of kernels, all results for these tensors."""
    d_x = torch.randn(gate.shape).to(gate.dtype)
    x, d_gate, d_up = right(activation, gate, up, d_x)
    memory.allow(gate, up, d_x)
    assert_rounded_once(kernels.gated_product(activation, gate, up), x)
    if halves:
        gradients = memory.uninitialised(gate, (*gate.shape[:-1], 2 * gate.shape[-1])).chunk(2, -1)
    else:
        gradients = tuple(memory.uninitialised(gate, gate.shape) for _ in range(2))
    given = d_x.clone()
    memory.allow(given)
    returned = kernels.gated_gradients(activation, gate, up, given, gradients, product)
    assert returned.data_ptr() == given.data_ptr()
    for found, wanted in zip(gradients, (d_gate, d_up), strict=True):
        assert_rounded_once(found, wanted)
    if product:
        assert_rounded_once(returned, x)
    else:
        assert torch.equal(returned, d_x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_and_product_are_rounded_once(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype, memory: Memory
) -> None:
    for product in (True, False):
        check(kernels, memory, activation, *laid_out("contiguous", shape, dtype), product, halves=False)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_are_read(layout: str, halves: bool, memory: Memory) -> None:
    for activation in ACTIVATIONS:
        check(kernels, memory, activation, *laid_out(layout, (3, 1100), torch.bfloat16), True, halves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_very_large_values_give_no_nan(activation: str) -> None:
    gate, up = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]]), torch.ones(1, 7)
    d_gate, d_up = torch.empty(2, 1, 7)
    x = kernels.gated_gradients(activation, gate, up, torch.ones(1, 7), (d_gate, d_up), True)
    for found, wanted in zip((x, d_gate, d_up), right(activation, gate, up, torch.ones(1, 7)), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-30)
