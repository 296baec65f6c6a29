"""Adam's own measure of a gradient: the update that its second moment, as it is now, makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import ConfigError
from lightning_lora.lora.shards import local_shard


def adam_metric(gradient: Tensor, exp_avg_sq: Tensor, step: int, beta2: float, eps: float) -> Tensor:
    """``gradient / (sqrt(v_hat) + eps)``: the update that Adam's present second moment makes of a gradient.

    The moment must not move between the gradients that are compared; it means little before ``1 / (1 - beta2)`` steps.

    Args:
        gradient: Any shape.
        exp_avg_sq: The same shape, ``v`` of the optimizer's state.
        step: Steps the optimizer has done, 1 at least.
        beta2: Decay of ``v``.
        eps: Of the optimizer.
    """
    return gradient / ((exp_avg_sq / (1 - beta2**step)).sqrt() + eps)


@torch.no_grad()
def curvature_along(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], direction: Sequence[Tensor], epsilon: float
) -> Tensor:
    """``u^T H u`` by a central second difference, exact on quadratics; parameters come back bit for bit.

    Args:
        loss: The loss of a fixed batch at the present parameters; called three times, without gradients.
        parameters: What the loss depends on.
        direction: ``u``, one tensor for each.
        epsilon: Length of the step along ``u``: large enough for the precision of the loss, small for its curvature.

    Returns:
        A scalar, nats.
    """
    kept = [parameter.clone() for parameter in parameters]

    def at(step: float) -> Tensor:
        for parameter, origin, along in zip(parameters, kept, direction, strict=True):
            parameter.copy_(origin + step * along)
        return loss()

    try:
        return (at(epsilon) + at(-epsilon) - 2 * at(0.0)) / epsilon**2
    finally:
        for parameter, origin in zip(parameters, kept, strict=True):
            parameter.copy_(origin)


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
        moment = local_shard(self.optimizer.state[parameter]["exp_avg_sq"])
        return adam_metric(gradient, moment, int(step), float(beta2), self._groups[parameter].get("eps", 0.0))
