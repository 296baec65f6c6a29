"""The gradient as Adam scales it: divided by the root of the second moment, times the learning rate of its group."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import MeasurementError
from lightning_lora.lora.shards import local_shard


def adam_scaled(gradient: Tensor, exp_avg_sq: Tensor, step: int, beta2: float, eps: float) -> Tensor:
    """``gradient / (sqrt(v_hat) + eps)``, the update that Adam's present second moment makes of a gradient.

    Args:
        gradient: Any shape.
        exp_avg_sq: ``v`` of the optimizer's state, the same shape.
        step: Optimizer steps done so far, at least 1.
        beta2: Decay of ``v``.
        eps: The optimizer's ``eps``.
    """
    return gradient / ((exp_avg_sq / (1 - beta2**step)).sqrt() + eps)


class AdamMetric:
    """Scales gradients to the step that an optimizer makes of them: by `adam_scaled`, and by the rate of their group.

    Rates count relative to the highest one: with LoRA+ or multipliers the parts that move most weigh most, and with one
    rate for all they change nothing. Moments and rates do not change within a step, so gradients of one step can be
    compared.

    Args:
        optimizer: Adam, or another optimizer that has ``betas`` and keeps ``exp_avg_sq``.

    Raises:
        ConfigError: If a parameter group has no ``betas``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        if not all("betas" in group for group in optimizer.param_groups):
            raise MeasurementError(f"{type(optimizer).__name__} has no betas: use Adam or AdamW.")
        self._steps: dict[nn.Parameter, float] = {}
        self._highest = 0.0
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}

    def start(self) -> None:
        """Read step counts and learning rates of the optimizer, before a measured step.

        Raises:
            ConfigError: If the optimizer has a state without ``exp_avg_sq``.
        """
        state = self.optimizer.state
        known = [parameter for parameter in self._groups if state.get(parameter)]
        if any("exp_avg_sq" not in state[parameter] for parameter in known):
            raise MeasurementError(f"{type(self.optimizer).__name__} keeps no exp_avg_sq: use Adam or AdamW.")
        # One transfer for all: on a GPU each read waits for the device.
        steps = torch.stack([torch.as_tensor(state[p]["step"]).float() for p in known]).tolist() if known else []
        self._steps = dict(zip(known, steps, strict=True))
        self._highest = max(float(group["lr"]) for group in self.optimizer.param_groups)

    def __call__(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Scale ``gradient`` of shape ``(*, parameter's shape)``, or this rank's shard of it.

        NaN during the first ``1 / (1 - beta2)`` steps, when ``v`` averages too few gradients.
        """
        group, step = self._groups[parameter], self._steps.get(parameter, 0.0)
        beta2 = group["betas"][1]
        # The tolerance makes beta2 = 0.95 wait for 20 steps, not for the 20.000000000000018 of the quotient.
        if step * (1 - beta2) < 1 - 1e-9:
            return torch.full_like(gradient, torch.nan)
        moment = local_shard(self.optimizer.state[parameter]["exp_avg_sq"])
        scaled = adam_scaled(gradient, moment, int(step), float(beta2), group.get("eps", 0.0))
        # Where every rate is zero, nothing moves, and no rate weighs more.
        return scaled * (float(group["lr"]) / self._highest) if self._highest else scaled
