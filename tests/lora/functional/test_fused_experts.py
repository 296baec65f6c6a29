"""The fused product of experts against the formula it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional import AdaptedWeight
from lightning_lora.lora.functional.expert_rows import GroupedRows, LoopedRows, rows_by_expert
from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.functional.gated_input import gated_input
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share

IN, OUT, R, SCALE = 8, 6, 3, 1.7
COUNTS = [2, 0, 3, 1]
ROWS, E = sum(COUNTS), len(COUNTS)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fused(x: Tensor, W: Tensor, A: Tensor, B: Tensor, counts: list[int], dropout: float = 0.0) -> Tensor:
    return fused_expert_linear(x, AdaptedWeight(W, None, A, B, SCALE), LoopedRows(counts), dropout)


def formula(x: Tensor, dropped: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return expert_linear(x, W, COUNTS) + expert_update(dropped, A, B, SCALE, COUNTS)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("shared_A", "shared_B"), [(False, False), (True, False), (False, True)])
def test_values_and_gradients_are_the_formulas(shared_A: bool, shared_B: bool, dropout: float) -> None:
    W = numbers(E, OUT, IN)
    x, A, B = numbers(ROWS, IN), numbers(1 if shared_A else E, R, IN), numbers(1 if shared_B else E, OUT, R)
    for leaf in (x, A, B):
        leaf.requires_grad_()
    torch.manual_seed(3)
    ours = fused(x, W, A, B, COUNTS, dropout)
    torch.manual_seed(3)
    dropped = drop(x, dropout, int(torch.randint(2**62, ()))) / kept_share(dropout)
    wanted = formula(x, dropped, W, A, B)
    torch.testing.assert_close(ours, wanted)
    gradient = numbers(*ours.shape)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), gradient), torch.autograd.grad(wanted, (x, A, B), gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_an_input_that_came_of_halves_sends_its_gradient_there() -> None:
    W, A, B = numbers(E, OUT, IN), numbers(E, R, IN).requires_grad_(), numbers(E, OUT, R).requires_grad_()
    gate_up = numbers(ROWS, 2 * IN).requires_grad_()
    gate, up = (gate_up * 1).chunk(2, -1)
    x = F.silu(gate) * up
    assert gated_input(x) is not None
    d_y = numbers(ROWS, OUT)
    ours = torch.autograd.grad(fused(x, W, A, B, COUNTS), (gate_up, A, B), d_y, True)
    for found, expected in zip(ours, torch.autograd.grad(formula(x, x, W, A, B), (gate_up, A, B), d_y), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_can_be_differentiated_again(dropout: float) -> None:
    W = numbers(E, OUT, IN)
    leaves = tuple(t.requires_grad_() for t in (numbers(ROWS, IN), numbers(E, R, IN), numbers(1, OUT, R)))

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(0)
        return fused(x, W, A, B, COUNTS, dropout)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("learning", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for_are_computed(learning: tuple[bool, ...]) -> None:
    leaves = numbers(ROWS, IN), numbers(E, R, IN), numbers(E, OUT, R)
    x, A, B = (leaf.requires_grad_(learns) for leaf, learns in zip(leaves, learning, strict=True))
    fused(x, numbers(E, OUT, IN), A, B, COUNTS).sum().backward()
    assert tuple(leaf.grad is not None for leaf in (x, A, B)) == learning


def test_no_rows_at_all_have_gradients_of_zero() -> None:
    x, A, B = (t.requires_grad_() for t in (numbers(0, IN), numbers(E, R, IN), numbers(E, OUT, R)))
    y = fused(x, numbers(E, OUT, IN), A, B, [0] * E)
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert A.grad is not None
    assert not A.grad.any()


TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
ENDS = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
WIDE_OUT = 16


def grouped(x: Tensor, W: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    return fused_expert_linear(x, AdaptedWeight(W, None, A, B, SCALE), GroupedRows(ENDS), dropout)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (found.double() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()


@pytest.mark.parametrize("rank", [3, 8], ids=["padded", "as it is"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("shared_A", "shared_B"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_grouped_values_and_gradients_are_the_formulas_past_rows_of_nobody(
    dtype: torch.dtype, shared_A: bool, shared_B: bool, dropout: float, rank: int
) -> None:
    """Rows beyond the last expert's, and their gradient, hold NaN, as uninitialised memory may; factors are float32."""
    beyond = torch.full((2, IN), torch.nan)
    x = torch.cat([numbers(ROWS, IN), beyond]).to(dtype).requires_grad_()
    W, d_y = numbers(E, WIDE_OUT, IN).to(dtype), numbers(ROWS + 2, WIDE_OUT).to(dtype)
    d_y[ROWS:] = torch.nan
    A = numbers(1 if shared_A else E, rank, IN).float().requires_grad_()
    B = numbers(1 if shared_B else E, WIDE_OUT, rank).float().requires_grad_()
    torch.manual_seed(3)
    ours = grouped(x, W, A, B, dropout)
    torch.manual_seed(3)
    dropped = drop(x, dropout, int(torch.randint(2**62, ())))[:ROWS].double() / kept_share(dropout)
    mask = (dropped / x[:ROWS].double()).detach()
    high = [t.detach().double().requires_grad_() for t in (x[:ROWS], A, B)]
    wanted = formula(high[0], high[0] * mask, W.double(), *high[1:])
    assert_near(ours[:ROWS], wanted, dtype)
    found = torch.autograd.grad(ours, (x, A, B), d_y)
    assert [gradient.dtype for gradient in found] == [dtype, torch.float32, torch.float32]
    expected = torch.autograd.grad(wanted, high, d_y[:ROWS].double())
    for one, other in zip((found[0][:ROWS], *found[1:]), expected, strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [GroupedRows(ENDS), LoopedRows(COUNTS)], ids=["grouped", "looped"])
def test_an_update_of_zero_changes_no_bit(rows: GroupedRows | LoopedRows, dtype: torch.dtype) -> None:
    x, W = numbers(ROWS, IN).to(dtype), numbers(E, WIDE_OUT, IN).to(dtype)
    A, B = numbers(E, R, IN).float(), torch.zeros(E, WIDE_OUT, R)
    base = F.grouped_mm(x, W.mT, offs=ENDS)
    found = fused_expert_linear(
        x, AdaptedWeight(W, None, A, B, SCALE), rows, product=lambda x, W: F.grouped_mm(x, W, offs=ENDS)
    )
    assert torch.equal(found, base)


def test_grouped_products_send_gradients_past_a_gate_and_can_be_differentiated_again() -> None:
    W = numbers(E, WIDE_OUT, IN)
    values = numbers(ROWS, 2 * IN), numbers(E, R, IN), numbers(1, WIDE_OUT, R)
    d_y, direction = numbers(ROWS, WIDE_OUT), numbers(ROWS, 2 * IN)

    def twice(dtype: torch.dtype, is_grouped: bool) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in values]
        gate, up = (leaves[0] * 1).chunk(2, -1)
        x = F.silu(gate) * up
        _, A, B = leaves
        y = grouped(x, W.to(dtype), A, B) if is_grouped else formula(x, x, W, A, B)
        once = torch.autograd.grad(y, leaves, d_y.to(dtype), retain_graph=True)
        again = torch.autograd.grad(y, leaves, d_y.to(dtype), create_graph=True)
        return *once, *again, *torch.autograd.grad(again[0], leaves, direction.to(dtype))

    for found, wanted in zip(twice(torch.float32, True), twice(torch.float64, False), strict=True):
        assert_near(found, wanted, torch.float32)


@pytest.mark.parametrize("learning", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_grouped_products_compute_only_the_gradients_asked_for(learning: tuple[bool, ...]) -> None:
    leaves = numbers(ROWS, IN).float(), numbers(E, R, IN).float(), numbers(E, WIDE_OUT, R).float()
    x, A, B = (leaf.requires_grad_(learns) for leaf, learns in zip(leaves, learning, strict=True))
    grouped(x, numbers(E, WIDE_OUT, IN).float(), A, B).sum().backward()
    assert tuple(leaf.grad is not None for leaf in (x, A, B)) == learning


def test_grouped_products_read_no_number() -> None:
    """Tensors without values have none to read; torch's rule for their grouped products knows bfloat16."""
    x = torch.empty(ROWS, IN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    W = torch.empty(E, WIDE_OUT, IN, dtype=torch.bfloat16, device="meta")
    A = torch.empty(E, R, IN, device="meta", requires_grad=True)
    B = torch.empty(E, WIDE_OUT, R, device="meta", requires_grad=True)
    rows = rows_by_expert(x, W, ENDS.to("meta"))
    y = fused_expert_linear(x, AdaptedWeight(W, None, A, B, SCALE), rows)
    gradients = torch.autograd.grad(y, (x, A, B), torch.empty_like(y))
    assert [gradient.shape for gradient in gradients] == [x.shape, A.shape, B.shape]
