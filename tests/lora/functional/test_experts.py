"""The products of a mixture of experts against the sum that defines them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.lora.functional.experts import (
    combine_experts,
    dispatch,
    expert_linear,
    expert_update,
    sort_by_expert,
)

T, K, E, IN, OUT, R = 7, 2, 4, 6, 5, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def routed() -> tuple[Tensor, Tensor]:
    """Experts and weights of each token; expert 2 gets none."""
    experts = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [1, 0], [3, 1], [0, 1]])
    return experts, torch.rand(T, K, dtype=torch.float64)


def test_a_mixture_is_the_weighted_sum_over_each_tokens_experts() -> None:
    (experts, weights), x, W = routed(), numbers(T, IN), numbers(E, OUT, IN)
    routing = sort_by_expert(experts, E)
    y = combine_experts(expert_linear(dispatch(x, routing), W, routing.counts), routing, weights)
    expected = torch.stack(
        [sum(weights[t, j] * W[experts[t, j]] @ x[t] for j in range(K)) for t in range(T)]  # type: ignore[misc]
    )
    torch.testing.assert_close(y, expected)
    assert routing.counts == [5, 5, 0, 4]


def test_pairs_with_no_expert_here_add_nothing() -> None:
    (experts, weights), x, W = routed(), numbers(T, IN), numbers(E, OUT, IN)
    elsewhere = experts.where(experts != 3, E)
    routing = sort_by_expert(elsewhere, E)
    y = combine_experts(expert_linear(dispatch(x, routing), W, routing.counts), routing, weights)
    W[3] = 0
    routing = sort_by_expert(experts, E)
    torch.testing.assert_close(
        y, combine_experts(expert_linear(dispatch(x, routing), W, routing.counts), routing, weights)
    )


@pytest.mark.parametrize(("num_A", "num_B"), [(E, E), (1, E), (E, 1)], ids=["own", "shared A", "shared B"])
def test_the_update_and_its_gradients_are_those_of_the_full_matrices(num_A: int, num_B: int) -> None:
    (experts, _), x = routed(), numbers(T, IN).requires_grad_()
    A, B = numbers(num_A, R, IN).requires_grad_(), numbers(num_B, OUT, R).requires_grad_()
    routing = sort_by_expert(experts, E)
    rows = dispatch(x, routing)
    ours = expert_update(rows, A, B, 2.5, routing.counts)
    full = expert_linear(rows, 2.5 * (B @ A).expand(E, -1, -1), routing.counts)
    torch.testing.assert_close(ours, full)
    wanted = numbers(*ours.shape)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), wanted, retain_graph=True),
        torch.autograd.grad(full, (x, A, B), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_experts", [E, 3], ids=["all here", "some elsewhere"])
def test_gradients_find_their_way_to_tokens_and_weights(num_experts: int) -> None:
    (experts, weights), x = routed(), numbers(T, IN).requires_grad_()
    weights.requires_grad_()
    routing = sort_by_expert(experts, num_experts)
    scale = torch.arange(1.0, num_experts + 1, dtype=torch.float64)

    def ours(x: Tensor, weights: Tensor) -> Tensor:
        by_row = scale.repeat_interleave(torch.tensor(routing.counts))[:, None]
        return combine_experts(dispatch(x, routing) * by_row, routing, weights)

    here = torch.cat([scale, torch.zeros(E - num_experts, dtype=torch.float64)])[experts]
    wanted = (here * weights).sum(1, keepdim=True) * x
    torch.testing.assert_close(ours(x, weights), wanted)
    d_y = numbers(T, IN)
    for found, expected in zip(
        torch.autograd.grad(ours(x, weights), (x, weights), d_y),
        torch.autograd.grad(wanted, (x, weights), d_y),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(ours, (x, weights))


def test_no_rows_at_all_give_none() -> None:
    assert expert_linear(numbers(0, IN), numbers(E, OUT, IN), [0] * E).shape == (0, OUT)
