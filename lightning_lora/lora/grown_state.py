"""Optimizer state of parameters that have grown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import RankChangeError

# Averages or sums of squares and other sizes, in the optimizers of torch: they divide a step, or are its length.
_SIZES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "sum", "step_size")
_AVERAGES = ("exp_avg", "momentum_buffer", "grad_avg", "prev", "ax")


def check_can_grow(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Raise `ConfigError` if the state of one of the parameters is not made of numbers and tensors of its shape."""
    for parameter in parameters:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not _is_number(value) and not (type(value) is Tensor and value.shape == parameter.shape):
                kind = f"a tensor of shape {tuple(value.shape)}" if type(value) is Tensor else type(value).__name__
                raise RankChangeError(
                    f"the rank of adapters cannot grow with {type(optimizer).__name__}: its state {name!r} of a "
                    f"{tuple(parameter.shape)} parameter is {kind}, which has no part for new rows and columns. Use an "
                    f"optimizer whose state is tensors of the shape of the parameter, such as torch.optim.AdamW."
                )


@torch.no_grad()
def extend_state(optimizer: Optimizer, shapes: Mapping[nn.Parameter, torch.Size]) -> None:
    """Give the state of grown parameters their new shape.

    The state of the old part stays bit for bit, and so does the number of steps. In the new part, averages of the
    gradient are zero, and averages of its square start at the mean of the old part. Zero there would be wrong: Adam
    corrects both averages for the number of steps that the *parameter* has made, so that the new part would move
    ``(1 - beta1^n) / sqrt(1 - beta2^n)`` times too far in its n-th step, about 6 times after 10 steps, late in a run.
    As it is, its first steps are ``1 - beta1^n`` of what they would be.

    Args:
        optimizer: Any optimizer that passes `check_can_grow`.
        shapes: Grown parameter to its shape before.
    """
    for parameter, shape in shapes.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape and not _is_number(value):
                fill = value.mean() if _is_size(name, value) else value.new_zeros(())
                grown = fill.expand(parameter.shape).clone(memory_format=torch.contiguous_format)
                grown[tuple(slice(0, length) for length in shape)] = value
                state[name] = grown


def _is_size(name: str, value: Tensor) -> bool:
    """Whether a state is a size; under a name of another library, whether it has no sign."""
    return name in _SIZES or (name not in _AVERAGES and bool((value >= 0).all()))


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
