"""Policy losses against numbers that the functions of verl, OpenRLHF and TRL gave for the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import ConfigError
from lightning_lora.tasks.rl import kl_estimate, policy_loss
from lightning_lora.tasks.rl.functional.policy_loss import loss_sum_and_count, sampler_correction, token_losses

# Two completions, of four and two tokens; what stands at padding must not matter.
PAD = 200.0
LP = [[-0.5, -1.2, -0.3, -2], [-1, -0.7, PAD, PAD]]
OLD = [[-0.6, -1, -0.8, -1], [-0.2, -1.9, 0, -PAD]]
SAMPLER = [[-0.65, -1.05, -0.7, -1.4], [-0.3, -1.7, PAD, 0]]
REF = [[-0.4, -1.5, -0.3, -1.2], [-1.1, -0.5, -PAD, PAD]]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
A = [1, -0.5]
TIS: dict[str, Any] = {"high": 1.1}
ICEPOP: dict[str, Any] = {"low": 0.9, "high": 1.2, "outside": "drop"}
SEQUENCE: dict[str, Any] = {"high": 1.1, "ratio": "row_sum"}
PPO = {"clip": (0.2, 0.2)}
WEIGHTED = [-0.18419515, -0.13645513, -0.27478688, -0.06131324, 0.03744408, 0.27667641]

ROWS: list[tuple[str, dict[str, Any], dict[str, Any] | None, float, list[float]]] = [
    ("ppo", PPO, None, -0.2386204418, [-0.18419515, -0.13645513, 0, -0.06131324, 0, 0.27667641]),
    (
        "ppo, mean of row means",
        PPO | {"normalise": "rows"},
        None,
        0.0785419763,
        [-0.13814636, -0.10234134, 0, -0.04598493, 0, 0.41501462],
    ),
    (
        "ppo, constant",
        PPO | {"normalise": "constant", "constant": 8},
        None,
        -0.0894826657,
        [-0.06907318, -0.05117067, 0, -0.02299247, 0, 0.10375365],
    ),
    (
        "ppo, mean of row sums",
        PPO | {"normalise": "constant", "constant": 1},
        None,
        -0.7158613255,
        [-0.55258546, -0.40936538, 0, -0.18393972, 0, 0.83002923],
    ),
    (
        "ppo, sum",
        PPO | {"normalise": "sum"},
        None,
        -1.4317226510,
        [-1.10517092, -0.81873075, 0, -0.36787944, 0, 1.66005846],
    ),
    (
        "clip-higher",
        {"clip": (0.2, 0.28)},
        None,
        -0.2519537752,
        [-0.18419515, -0.13645513, 0, -0.06131324, 0, 0.27667641],
    ),
    ("dual clip", PPO | {"dual_clip": 3}, None, -0.2652968521, [-0.18419515, -0.13645513, 0, -0.06131324, 0, 0]),
    ("delta of TRL", PPO | {"dual_clip": 2}, None, -0.3486301854, [-0.18419515, -0.13645513, 0, -0.06131324, 0, 0]),
    ("importance weighted", {}, None, -0.3426299066, WEIGHTED),
    (
        "reinforce",
        {"detach_ratio": True, "clip": (0, 0)},
        None,
        0.525,
        [-1 / 6, -1 / 6, -1 / 6, -1 / 6, 1 / 12, 1 / 12],
    ),
    ("cispo of TRL, cap 5", {"detach_ratio": True, "clip": (1, 4)}, None, 0.2297887035, WEIGHTED),
    (
        "cispo",
        PPO | {"detach_ratio": True},
        None,
        0.4458437271,
        [-0.18419515, -0.13645513, -0.2, -0.13333333, 0.06666667, 0.1],
    ),
    (
        "gspo",
        PPO | {"ratio": "row_mean", "normalise": "rows"},
        None,
        -0.1250032987,
        [-0.1075885] * 4 + [0.15267534] * 2,
    ),
    ("rloo", PPO | {"ratio": "row_sum", "normalise": "rows"}, None, 0.0985503564, [-0.27440582] * 4 + [0.37295617] * 2),
    (
        "ppo, weights of tokens held",
        PPO,
        TIS,
        -0.2856455986,
        [-0.19363904, -0.14345133, 0, -0.06744456, 0, 0.22652349],
    ),
    ("ppo, tokens dropped", PPO, ICEPOP, -0.4443797923, [-0.19363904, -0.14345133, 0, 0, 0, 0]),
    (
        "ppo, weights of rows held",
        PPO,
        SEQUENCE,
        -0.3294902074,
        [-0.20261467, -0.15010064, 0, -0.06744456, 0, 0.25034717],
    ),
]


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("options", "correction", "value", "gradient"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_losses_and_gradients_are_those_of_the_libraries(
    options: dict[str, Any], correction: dict[str, Any] | None, value: float, gradient: list[float], dtype: torch.dtype
) -> None:
    logprobs, old = tensor(LP, dtype).requires_grad_(), tensor(OLD, dtype)
    weights = None if correction is None else sampler_correction(old, tensor(SAMPLER, dtype), MASK, **correction)
    loss = policy_loss(logprobs, old, tensor(A, dtype), MASK, weights=weights, **options)
    loss.backward()
    tolerance = 1e-9 if dtype is torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(value, abs=tolerance)
    assert logprobs.grad is not None
    # The reference was written down with 8 digits.
    assert logprobs.grad[MASK.bool()].tolist() == pytest.approx(gradient, abs=max(tolerance, 6e-9))
    assert not logprobs.grad[~MASK.bool()].any()


def test_the_weights_of_the_sampler_are_those_of_the_libraries() -> None:
    old, sampler = tensor(OLD), tensor(SAMPLER)
    tokens = sampler_correction(old, sampler, MASK)
    ratios = [1.0512710964, 1.0512710964, 0.904837418, 1.4918246976, 1.1051709181, 0.8187307531]
    assert tokens[MASK.bool()].tolist() == pytest.approx(ratios, abs=1e-9)
    rows = sampler_correction(old, sampler, MASK, ratio="row_sum")
    assert rows[:, 0].tolist() == pytest.approx([1.4918246976, 0.904837418], abs=1e-9)


def test_one_number_per_token_is_one_per_completion_repeated() -> None:
    per_token = tensor(A)[:, None].expand(2, 4)
    one, other = (policy_loss(tensor(LP), tensor(OLD), given, MASK) for given in (tensor(A), per_token))
    assert torch.equal(one, other)


@pytest.mark.parametrize("normalise", ["tokens", "rows", "constant", "sum"])
def test_sums_and_counts_of_parts_add_up_to_those_of_the_whole(normalise: str) -> None:
    losses = token_losses(tensor(LP), tensor(OLD), tensor(A), MASK)
    constant = 8 if normalise == "constant" else None
    whole, parts = (
        loss_sum_and_count(losses, MASK, normalise, constant),
        [loss_sum_and_count(losses[row : row + 1], MASK[row : row + 1], normalise, constant) for row in range(2)],
    )
    total, count = (sum(part[i] for part in parts) for i in range(2))
    assert float(total) == pytest.approx(float(whole[0]), abs=1e-12)
    assert float(count) == (2 if normalise == "sum" else float(whole[1]))


def test_rows_without_a_trained_token_give_no_nan() -> None:
    logprobs = tensor(LP).requires_grad_()
    for normalise in ("tokens", "rows", "sum"):
        loss = policy_loss(logprobs, tensor(OLD), tensor(A), torch.zeros_like(MASK), normalise=normalise)
        assert float(loss.detach()) == 0
        loss.backward()
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def test_a_probability_of_zero_gives_a_finite_loss_and_gradient() -> None:
    logprobs = tensor([[-torch.inf, -1.0]]).requires_grad_()
    loss = policy_loss(logprobs, tensor([[-1.0, -1.0]]), tensor([1.0]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def kl(kind: str) -> tuple[Tensor, Tensor]:
    logprobs = tensor(LP).requires_grad_()
    estimate = kl_estimate(logprobs, tensor(REF), kind).masked_fill(~MASK.bool(), 0)
    (gradient,) = torch.autograd.grad(estimate.sum() / 6, logprobs)
    return estimate.detach(), gradient[MASK.bool()]


K3 = [0.00517092, 0.04081822, 0, 0.42554093, 0.00483742, 0.02140276]
K2_GRADIENT = [-0.01666667, 0.05, 0, -0.13333333, 0.01666667, -0.03333333]


def test_divergences_are_those_of_the_libraries() -> None:
    k1, (k2, k2_gradient), (k3, k3_gradient), (plus, plus_gradient) = kl("k1")[0], kl("k2"), kl("k3"), kl("k3+")
    assert k1[MASK.bool()].tolist() == pytest.approx([-0.1, 0.3, 0, -0.8, 0.1, -0.2], abs=1e-9)
    assert float(k1.sum() / 6) == pytest.approx(-0.1166666667, abs=1e-9)
    assert float(k2.sum() / 6) == pytest.approx(0.0658333333, abs=1e-9)
    assert float(k3.sum() / 6) == pytest.approx(0.0829617072, abs=1e-9)
    assert k3[MASK.bool()].tolist() == pytest.approx(K3, abs=6e-9)
    assert float((k3.sum(1) / MASK.sum(1)).mean()) == pytest.approx(0.0655013025, abs=1e-9)
    expected = [-0.01752849, 0.04319696, 0, -0.20425682, 0.01586043, -0.03690046]
    assert k3_gradient.tolist() == pytest.approx(expected, abs=6e-9)
    assert k2_gradient.tolist() == plus_gradient.tolist() == pytest.approx(K2_GRADIENT, abs=6e-9)
    assert torch.equal(plus, k3)
    ratio = (tensor(LP) - tensor(OLD)).masked_fill(~MASK.bool(), 0).exp()
    assert float((ratio * k3).sum() / 6) == pytest.approx(0.0448191486, abs=1e-9)
    tinker = 0.1 * (k1.sum() / 6 - k1)[MASK.bool()]
    expected = [-0.0016666667, -0.0416666667, -0.0116666667, 0.0683333333, -0.0216666667, 0.0083333333]
    assert tinker.tolist() == pytest.approx(expected, abs=1e-9)


TRUE_GRADIENT = [-0.2488374424, -0.1491138478, 0.3979512903]


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", 0.3074569335, [0, 0, 0]),
        ("k2", 0.3680602489, TRUE_GRADIENT),
        ("k3", 0.3074569335, [-0.2237785282, -0.1324632085, 0.3562417367]),
        ("k3+", 0.3074569335, TRUE_GRADIENT),
    ],
)
def test_which_estimate_has_the_right_value_and_which_the_right_gradient(
    kind: str, value: float, gradient: list[float]
) -> None:
    logits, reference = tensor([0.3, -0.2, 1]).requires_grad_(), tensor([0.5, 0.3, 0.2]).log()
    logprobs = logits.log_softmax(-1)
    # The expectation over what the policy samples; samples have no gradient.
    expected = (logprobs.detach().exp() * kl_estimate(logprobs, reference, kind)).sum()
    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    assert float(expected.detach()) == pytest.approx(value, abs=1e-9)
    assert found.tolist() == pytest.approx(gradient, abs=1e-9)
    true = (logprobs.exp() * (logprobs - reference)).sum()
    assert torch.autograd.grad(true, logits)[0].tolist() == pytest.approx(TRUE_GRADIENT, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "token"}, "normalise must be one of .*did you mean 'tokens'"),
        ({"normalise": "constant"}, "constant divides rows with normalise='constant' only"),
        ({"constant": 3}, "constant divides rows"),
        ({"clip": (-0.1, 0.2)}, "clip must be two numbers"),
        ({"clip": (1.5, 0.2)}, "clip must be two numbers"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"ratio": "row"}, "ratio must be one of"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_loss(tensor(LP), tensor(OLD), tensor(A), MASK, **options)


def test_an_unknown_estimate_or_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl must be one of k1, k2, k3"):
        kl_estimate(tensor(LP), tensor(REF), "k4")
    with pytest.raises(ConfigError, match="outside must be 'clamp' or 'drop'"):
        sampler_correction(tensor(OLD), tensor(SAMPLER), MASK, outside="mask")
