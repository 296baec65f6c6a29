r"""Other measures of a gradient than its norm: as Adam scales it, and by the curvature it meets.

Each gives a quadratic form that takes the place of the square norms in `signal_and_trace`.

References:
    Qiao et al., *Pollux*, OSDI 2021, section 3.1, for Adam's metric, https://arxiv.org/abs/2008.12260
    McCandlish et al., 2018, equation 2.8, for ``B_noise = tr(H Sigma) / (G^T H G)``, https://arxiv.org/abs/1812.06162
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
