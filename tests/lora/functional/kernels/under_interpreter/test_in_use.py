"""Layers and the loss at the head with kernels in force: the formula's gradients within the rounding of the type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.functional.expert_rows import LoopedRows
from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.functional.kernels import cross_entropy, gate, narrow
from lightning_lora.tasks import head_chunks
from lightning_lora.tasks.head_loss import head_loss

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
ROWS, WIDTH, FF, RANK, SCALE = 10, 12, 20, 3, 1.5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
}
TYPES = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called."""
    counts: Counter[str] = Counter()
    for module, name in (
        (gate, "gated_product"),
        (gate, "gated_gradients"),
        (narrow, "both_narrow"),
        (cross_entropy, "cross_entropy_"),
    ):
        kernel = getattr(module, name)

        def counted(*arguments: Any, _name: str = name, _kernel: Any = kernel) -> Any:
            counts[_name] += 1
            return _kernel(*arguments)

        monkeypatch.setattr(module, name, counted)
    return counts


def compare(function: Callable[..., Any], formula: Callable[..., Any], shapes: list[Any], dtype: torch.dtype) -> None:
    """Outputs and gradients of a function of one type and of a formula in float64."""
    low = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]
    high = [leaf.detach().double().requires_grad_() for leaf in low]
    y, right = function(*low), formula(*high)
    d_y = torch.randn_like(y)
    found = [y.detach(), *torch.autograd.grad(y, low, d_y)]
    wanted = [right.detach(), *torch.autograd.grad(right, high, d_y.double())]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize(
    ("activation", "halves", "dtype"),
    [
        ("silu", False, torch.float32),
        ("silu", False, torch.bfloat16),
        ("silu", True, torch.float16),
        ("gelu", False, torch.float16),
        ("gelu", True, torch.float32),
        ("tanh", True, torch.bfloat16),
    ],
)
def test_a_gated_network(activation: str, halves: bool, dtype: torch.dtype, used: Counter[str]) -> None:
    widths = [2 * FF] if halves else [FF, FF]
    Ws = [torch.randn(width, WIDTH).to(dtype) for width in widths]
    W_down = (torch.randn(WIDTH, FF) / FF**0.5).to(dtype)

    def down_input(outputs: Any) -> Tensor:
        g, u = outputs[0].chunk(2, -1) if halves else outputs
        return ACTIVATIONS[activation](g) * u

    def fused(x: Tensor, *factors: Tensor) -> Tensor:
        *before, A, B = factors
        layers = [AdaptedWeight(W, None, *pair, SCALE) for W, pair in zip(Ws, pairs(before), strict=True)]
        h = down_input(fused_lora_linears(x, layers))
        return fused_lora_linears(h, [AdaptedWeight(W_down, None, A, B, SCALE)])[0]

    def formula(x: Tensor, *factors: Tensor) -> Tensor:
        def layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return x @ W.double().T + SCALE * x @ A.T @ B.T

        *before, A, B = factors
        return layer(down_input([layer(x, W, *pair) for W, pair in zip(Ws, pairs(before), strict=True)]), W_down, A, B)

    up_factors = [shape for width in widths for shape in ((RANK, WIDTH), (width, RANK))]
    # One layer alone also merges its weights in float32 where there are many rows; here are few.
    compare(fused, formula, [(2, ROWS // 2, WIDTH), *up_factors, (RANK, FF), (WIDTH, RANK)], dtype)
    assert used == {"gated_gradients": 1, "both_narrow": len(widths) + 1}


def pairs(factors: Any) -> list[tuple[Tensor, Tensor]]:
    """Factors two by two."""
    return list(zip(factors[::2], factors[1::2], strict=True))


@TYPES
def test_gated_experts(dtype: torch.dtype, used: Counter[str]) -> None:
    counts = [4, 0, 6]
    W = (torch.randn(3, WIDTH, FF) / FF**0.5).to(dtype)

    def fused(g: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fused_expert_linear(F.silu(g * 1) * (u * 1), AdaptedWeight(W, None, A, B, SCALE), LoopedRows(counts))

    def formula(g: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x = F.silu(g) * u
        return expert_linear(x, W.double(), counts) + expert_update(x, A, B, SCALE, counts)

    compare(fused, formula, [(ROWS, FF), (ROWS, FF), (3, RANK, FF), (3, WIDTH, RANK)], dtype)
    assert used["gated_product"] == used["gated_gradients"] == 1


def test_a_layer_whose_output_is_not_used_and_a_gradient_that_is_one_value() -> None:
    W, A, B = torch.randn(FF, WIDTH), torch.randn(RANK, WIDTH), torch.randn(FF, RANK)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    factors = [A.requires_grad_(), B.requires_grad_()]
    y, _ = fused_lora_linears(x, [AdaptedWeight(W, None, A, B, SCALE), AdaptedWeight(W, None, A * 2, B * 2, SCALE)])
    found = torch.autograd.grad(y.sum(), [x, *factors])
    wanted = torch.autograd.grad((x @ W.T + SCALE * x @ A.T @ B.T).sum(), [x, *factors])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_a_gradient_can_be_differentiated_again_without_kernels(used: Counter[str]) -> None:
    g, u, A, B = (torch.randn(shape).requires_grad_() for shape in ((4, FF), (4, FF), (RANK, FF), (WIDTH, RANK)))
    W = torch.randn(WIDTH, FF)
    y = fused_lora_linears(F.silu(g * 1) * (u * 1), [AdaptedWeight(W, None, A, B, SCALE)])[0]
    x = F.silu(g) * u
    right = x @ W.T + SCALE * x @ A.T @ B.T
    once = [torch.autograd.grad(output.square().sum(), g, create_graph=True)[0] for output in (y, right)]
    assert not used
    twice = [torch.autograd.grad(d_g.sum(), [g, u, A]) for d_g in once]
    for a, b in zip(*twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@TYPES
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "factors, bias and update"])
def test_the_loss_at_the_head(
    extras: bool, dtype: torch.dtype, used: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 4)
    vocab, labels = 37, torch.randint(37, (2, ROWS))
    labels[:, ::3] = -100
    weight, factors = torch.randn(vocab, WIDTH).to(dtype), torch.rand(2, ROWS) + 0.5

    def fused(hidden: Tensor, *more: Tensor) -> Tensor:
        if not more:
            return head_loss(hidden, weight, labels, divisor=7)
        bias, *update = more
        return head_loss(hidden, weight, labels, bias, update=(update[0], update[1]), divisor=7, factors=factors)

    def formula(hidden: Tensor, *more: Tensor) -> Tensor:
        scores = hidden @ weight.double().T
        if more:
            scores = scores + more[0] + more[1] @ more[2].T
        losses = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return (losses * factors.double().flatten() if more else losses).sum() / 7

    compare(fused, formula, [(2, ROWS, WIDTH), *([(vocab,), (2, ROWS, RANK), (vocab, RANK)] if extras else [])], dtype)
    num_chunks = -(-int((labels != -100).sum()) // 4)
    assert used == {"cross_entropy_": num_chunks}
    with torch.no_grad():
        hidden = torch.randn(2, ROWS, WIDTH).to(dtype)
        torch.testing.assert_close(fused(hidden), formula(hidden.double()).float(), rtol=LIMITS[dtype], atol=0)
