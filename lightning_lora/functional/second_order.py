"""Gradients that can be differentiated again, for functions whose usual backward pass cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_of(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``needed`` inputs that can be differentiated again.

    Args:
        outputs: Each output with its gradient.
        inputs: What they depend on.
        needed: For which of the inputs.
    """
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    ys, d_ys = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, d_ys, create_graph=True, allow_unused=True))
    return [next(found) if needs and tensor is not None else None for tensor, needs in zip(inputs, needed, strict=True)]
