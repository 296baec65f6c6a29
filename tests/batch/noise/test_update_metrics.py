"""Adam's metric and curvature on quadratics, where the answer is known (V7)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.batch.noise.adam_metric import adam_metric, curvature_along
from lightning_lora.batch.noise.noise_scale import combine, signal_and_trace

CURVATURES = torch.logspace(-1, 1, 16, dtype=torch.float64)
DEVIATIONS = torch.linspace(1, 3, 16, dtype=torch.float64).flip(0)
MEAN = torch.linspace(0.2, 1, 16, dtype=torch.float64)
SCALES = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (CURVATURES * theta.square()).sum()


def test_the_second_difference_is_the_quadratic_form_and_parameters_come_back() -> None:
    theta = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    origin, direction = theta.clone(), torch.ones(16, dtype=torch.float64)
    found = curvature_along(lambda: quadratic(theta), [theta], [direction], epsilon=1e-3)
    assert float(found) == pytest.approx(float(CURVATURES.sum()), rel=1e-6)
    assert torch.equal(theta, origin)


def test_parameters_come_back_when_the_loss_fails() -> None:
    theta = torch.ones(3, dtype=torch.float64)

    def fail() -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        curvature_along(fail, [theta], [torch.ones(3, dtype=torch.float64)], epsilon=0.1)
    assert torch.equal(theta, torch.ones(3, dtype=torch.float64))


def test_the_curvature_weighted_noise_scale_is_that_of_the_quadratic() -> None:
    rows, count, num_steps = 4, 4, 1500
    noise = torch.randn(num_steps, count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = MEAN + DEVIATIONS * noise / rows**0.5
    theta = torch.zeros(16, dtype=torch.float64)

    def square(update: Tensor) -> Tensor:
        return curvature_along(lambda: quadratic(theta), [theta], [update], epsilon=0.1)

    updates = SCALES * gradients
    squares = torch.stack([torch.stack([square(update) for update in step]) for step in updates[:300]])
    means = torch.stack([square(step.mean(0)) for step in updates[:300]])
    # The form is diagonal: the rest of the steps by hand, so that the test takes seconds and its error 3 %.
    by_hand = (CURVATURES * updates.square()).sum(-1), (CURVATURES * updates.mean(1).square()).sum(-1)
    torch.testing.assert_close(squares, by_hand[0][:300])
    torch.testing.assert_close(means, by_hand[1][:300])
    estimate = combine(*signal_and_trace(*by_hand, rows))
    weighted = CURVATURES * SCALES.square()
    truth = float((weighted * DEVIATIONS.square()).sum() / (weighted * MEAN.square()).sum())
    simple = float(DEVIATIONS.square().sum() / MEAN.square().sum())
    assert estimate.value == pytest.approx(truth, rel=0.03)
    assert abs(simple / truth - 1) > 0.15


def test_adams_metric_is_the_update_of_a_first_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    gradient = parameter.grad.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    found = adam_metric(gradient, state["exp_avg_sq"], int(state["step"]), 0.9, 1e-3)
    torch.testing.assert_close(-parameter.detach(), found)
