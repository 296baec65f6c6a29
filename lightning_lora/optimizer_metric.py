"""Adam's own measure of a gradient: the update that its second moment, as it is now, makes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import ConfigError
from lightning_lora.functional.update_metrics import adam_metric
from lightning_lora.parts import local_part


class OptimizerMetric:
    """``g / (sqrt(v_hat) + eps)`` with the ``v`` of an optimizer; NaN before that means something.

    It stands still within a step: optimizers change their state in ``step`` only.

    Args:
        optimizer: Adam, or whichever keeps ``exp_avg_sq`` and has ``betas``.

    Raises:
        ConfigError: If it has no ``betas``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        if not all("betas" in group for group in optimizer.param_groups):
            raise ConfigError(f"{type(optimizer).__name__} has no betas: Adam's metric is known for Adam's kind alone.")
        self._steps: dict[nn.Parameter, float] = {}
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}

    def start(self) -> None:
        """Look at the state, before a measured step.

        Raises:
            ConfigError: If there is one without ``exp_avg_sq``.
        """
        state = self.optimizer.state
        known = [parameter for parameter in self._groups if state.get(parameter)]
        if any("exp_avg_sq" not in state[parameter] for parameter in known):
            raise ConfigError(f"{type(self.optimizer).__name__} keeps no exp_avg_sq: Adam's metric needs it.")
        # In one piece: on a GPU each number that is read waits for the device.
        steps = torch.stack([torch.as_tensor(state[p]["step"]).float() for p in known]).tolist() if known else []
        self._steps = dict(zip(known, steps, strict=True))

    def __call__(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The measure of ``gradient`` ``(*, parameter's shape)``, or of this rank's shard of it.

        NaN until ``1 / (1 - beta2)`` steps are done: ``v`` is a mean over too few before.
        """
        beta2, step = self._groups[parameter]["betas"][1], self._steps.get(parameter, 0.0)
        # A beta2 of 0.95 asks for 20 steps, not for the 20.000000000000018 that the quotient gives.
        if step * (1 - beta2) < 1 - 1e-9:
            return torch.full_like(gradient, torch.nan)
        moment = local_part(self.optimizer.state[parameter]["exp_avg_sq"])
        return adam_metric(gradient, moment, int(step), float(beta2), self._groups[parameter].get("eps", 0.0))
