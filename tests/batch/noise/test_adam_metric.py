"""The gradient as Adam scales it is the update that Adam makes (V7)."""

from __future__ import annotations

import torch

from lightning_lora.batch.noise.adam_metric import adam_scaled


def test_adams_metric_is_the_update_of_a_first_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    gradient = parameter.grad.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    found = adam_scaled(gradient, state["exp_avg_sq"], int(state["step"]), 0.9, 1e-3)
    torch.testing.assert_close(-parameter.detach(), found)
