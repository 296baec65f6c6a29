"""Advantages, values and penalties against numbers of verl, OpenRLHF, TRL and torchtune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import ConfigError
from lightning_lora.tasks.rl import gae, group_advantages
from lightning_lora.tasks.rl.functional.advantages import constant_groups, overlong_penalty, value_loss, whiten

REWARDS = [[1, 0, 0, 1], [0.5] * 4, [1, 0.2, 0, 0.3]]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "eps", "first", "last"),
    [
        ("mean", 0, [0.5, -0.5, -0.5, 0.5], [0.625, -0.175, -0.375, -0.075]),
        (
            "grpo",
            1e-4,
            [0.8658754298, -0.8658754298, -0.8658754298, 0.8658754298],
            [1.4366728018, -0.4022683845, -0.8620036811, -0.1724007362],
        ),
        ("rloo", 0, [2 / 3, -2 / 3, -2 / 3, 2 / 3], [0.8333333333, -0.2333333333, -0.5, -0.1]),
        ("maxrl", 0, [1, -1, -1, 1], [1.6666666667, -0.4666666667, -1, -0.2]),
    ],
)
def test_advantages_are_those_of_the_libraries(kind: str, eps: float, first: list[float], last: list[float]) -> None:
    found = group_advantages(tensor(REWARDS), kind, eps=eps)
    assert found[0].tolist() == pytest.approx(first, abs=1e-9)
    assert not found[1].any()
    assert found[2].tolist() == pytest.approx(last, abs=1e-9)


def test_the_epsilon_of_verl_and_the_deviation_of_the_batch() -> None:
    found = group_advantages(tensor(REWARDS), "grpo", eps=1e-6)
    assert [float(found[0, 0]), float(found[2, 0])] == pytest.approx([0.8660239038, 1.4369998184], abs=1e-9)
    found = group_advantages(tensor(REWARDS), "batch")
    assert [float(found[0, 0]), float(found[2, 0])] == pytest.approx([1.3069299176, 1.6336623969], abs=1e-9)


def test_the_batch_is_that_of_all_ranks() -> None:
    """Two halves that add up their sums have the deviation of the whole."""
    whole, halves = tensor(REWARDS + REWARDS[2:]), [tensor(REWARDS[:2]), tensor(REWARDS[2:] * 2)]
    totals = [torch.stack([whole.sum(), tensor(whole.numel())]), (whole - whole.mean()).square().sum()]
    parts = []
    for half in halves:
        answers = iter(totals)
        parts.append(group_advantages(half, "batch", sum_over_ranks=lambda _, answers=answers: next(answers)))
    assert torch.allclose(torch.cat(parts), group_advantages(whole, "batch"), atol=1e-12)


def test_a_constant_group_has_exactly_no_advantage() -> None:
    # The mean of eight times .1 is not .1 in floating point.
    rewards = torch.full((1, 8), 0.1)
    for kind in ("mean", "grpo", "batch", "rloo", "maxrl"):
        assert not group_advantages(rewards, kind).any(), kind
    assert constant_groups(torch.tensor([[0.1] * 3, [0.1, 0.1, 0.2]])).tolist() == [True, False]


def test_completions_that_are_left_out_leave_the_mean_too() -> None:
    rewards, mask = tensor([[1, 0, 7, 7], [0, 3, 3, 3]]), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert group_advantages(rewards, mask=mask).tolist() == [[0.5, -0.5, 0, 0], [0, 0, 0, 0]]
    assert group_advantages(rewards, "rloo", mask=mask)[0].tolist() == [1, -1, 0, 0]
    assert constant_groups(rewards, mask).tolist() == [False, True]


VALUES = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.3, 0.1, 0.2, 9, 9]]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
PER_TOKEN = [[0, 0, 0, 0, 1], [0, 0, -0.5, 0, 0]]
ADVANTAGES = [0.7443815509, 0.6872743763, 0.627617625, 0.56525, 0.5, -0.728009175, -0.56035, -0.7]


def test_generalised_advantages_are_those_of_the_libraries() -> None:
    advantages, returns = gae(tensor(PER_TOKEN), tensor(VALUES), MASK, 0.99, 0.95)
    assert advantages[MASK.bool()].tolist() == pytest.approx(ADVANTAGES, abs=1e-9)
    expected = [0.8443815509, 0.8872743763, 0.927617625, 0.96525, 1, -0.428009175, -0.46035, -0.5]
    assert returns[MASK.bool()].tolist() == pytest.approx(expected, abs=1e-9)
    assert not advantages[1, 3:].any()
    plain = gae(tensor(PER_TOKEN), tensor(VALUES), MASK, 1, 1)[0][MASK.bool()]
    assert plain.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, -0.8, -0.6, -0.7], abs=1e-9)


def test_tokens_in_between_that_are_not_trained_are_passed_over() -> None:
    mask, rewards = torch.tensor([[1, 1, 0, 1, 1]]), tensor([[0, 0, 0, 0, 1]])
    advantages, _ = gae(rewards, tensor([[0.1, 0.2, 7, 0.4, 0.5]]), mask, 0.99, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.7823243763, 0.727617625, 0, 0.56525, 0.5], abs=1e-9)


def test_whitened_advantages_are_those_of_the_libraries() -> None:
    advantages = torch.zeros(2, 5, dtype=torch.float64)
    advantages[MASK.bool()] = tensor(ADVANTAGES)
    found = whiten(advantages, MASK)[MASK.bool()].tolist()
    expected = [0.8961715071, 0.8112094621, 0.7224542465, 0.6296658885, 0.5325892343]
    assert found == pytest.approx([*expected, -1.2943996084, -1.0449621869, -1.2527285433], abs=1e-9)
    found = whiten(advantages, MASK, unbiased=False)[MASK.bool()].tolist()
    assert [found[0], found[-1]] == pytest.approx([0.9580476505, -1.3392231599], abs=1e-9)


def test_value_losses_are_those_of_the_libraries() -> None:
    values = tensor([[0.5, 0.1, -0.4]]).requires_grad_()
    old, returns, mask = tensor([[0.2] * 3]), tensor([[1, 0, -0.1]]), torch.ones(1, 3)
    losses = value_loss(values, old, returns, mask, clip=0.2)
    losses.mean().backward()
    assert losses.detach()[0].tolist() == pytest.approx([0.18, 0.005, 0.045], abs=1e-9)
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0, 0.0333333333, -0.1], abs=1e-9)
    assert float(value_loss(values.detach(), old, returns, mask).mean()) == pytest.approx(0.0583333333, abs=1e-9)


def test_the_penalty_of_long_completions_is_that_of_dapo() -> None:
    assert overlong_penalty(tensor([10, 14, 18, 20, 21]), 20, 8).tolist() == [0, -0.25, -0.75, -1, -1]


def test_a_group_of_one_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="a single completion has nothing to be compared with"):
        group_advantages(torch.ones(4, 1))
    with pytest.raises(ConfigError, match=r"advantage must be one of .*did you mean 'grpo'"):
        group_advantages(torch.ones(4, 2), "gpro")
