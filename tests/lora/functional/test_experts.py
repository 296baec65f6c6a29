"""The products of a mixture of experts against the sum that defines them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.lora.functional.experts import expert_linear, expert_update

E, IN, OUT, R = 4, 6, 5, 3
# Expert 2 gets no row.
COUNTS = [5, 5, 0, 4]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_every_row_is_multiplied_by_the_matrix_of_its_expert() -> None:
    x, W = numbers(sum(COUNTS), IN), numbers(E, OUT, IN)
    owner = torch.arange(E).repeat_interleave(torch.tensor(COUNTS))
    torch.testing.assert_close(expert_linear(x, W, COUNTS), torch.einsum("ti,toi->to", x, W[owner]))


@pytest.mark.parametrize(("num_A", "num_B"), [(E, E), (1, E), (E, 1)], ids=["own", "shared A", "shared B"])
def test_the_update_and_its_gradients_are_those_of_the_full_matrices(num_A: int, num_B: int) -> None:
    x = numbers(sum(COUNTS), IN).requires_grad_()
    A, B = numbers(num_A, R, IN).requires_grad_(), numbers(num_B, OUT, R).requires_grad_()
    ours = expert_update(x, A, B, 2.5, COUNTS)
    full = expert_linear(x, 2.5 * (B @ A).expand(E, -1, -1), COUNTS)
    torch.testing.assert_close(ours, full)
    wanted = numbers(*ours.shape)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), wanted, retain_graph=True),
        torch.autograd.grad(full, (x, A, B), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_no_rows_at_all_give_none() -> None:
    assert expert_linear(numbers(0, IN), numbers(E, OUT, IN), [0] * E).shape == (0, OUT)
