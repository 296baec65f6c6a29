"""The gradient as Adam scales it is the update that Adam makes (V7)."""

from __future__ import annotations

import torch

from lightning_lora.batch.noise.adam_metric import AdamMetric, adam_scaled


def test_adams_metric_is_the_update_of_a_first_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    gradient = parameter.grad.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    found = adam_scaled(gradient, state["exp_avg_sq"], int(state["step"]), 0.9, 1e-3)
    torch.testing.assert_close(-parameter.detach(), found)


def test_groups_weigh_by_their_learning_rates_as_in_the_step_that_adam_makes() -> None:
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [first], "lr": 0.3}, {"params": [second], "lr": 0.03, "betas": (0.0, 0.9), "eps": 1e-4}]
    optimizer = torch.optim.Adam(groups, betas=(0.0, 0.5), eps=1e-6)
    before = torch.zeros(8).double()
    for _ in range(12):
        first.grad, second.grad = torch.randn(4).double(), torch.randn(4).double()
        before = torch.cat([first, second]).detach()
        optimizer.step()
    moved = before - torch.cat([first, second]).detach()
    metric = AdamMetric(optimizer)
    metric.start()
    assert first.grad is not None
    assert second.grad is not None
    found = torch.cat([metric(first, first.grad), metric(second, second.grad)])
    torch.testing.assert_close(0.3 * found, moved)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    metric.start()
    assert bool(metric(second, second.grad).isfinite().all())
