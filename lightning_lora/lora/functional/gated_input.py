"""Inputs of gated feed-forward networks, which are cheaper to compute again than to keep.

The last layer of such a network is given ``silu(gate) * up``. A backward pass that keeps it, and what autograd keeps to
differentiate it, holds four tensors of that width; two are enough. What made the tensor is read from autograd's graph,
so it works in any model, whatever its code looks like. An activation alone is kept: to compute it again costs as much
time and saves half as much.

Shape legend: ``*`` any leading axes, ``ff`` width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Origin(NamedTuple):
    """A tensor as ``activation(gate) * up``.

    Args:
        activation: ``silu``, ``gelu`` (``none``) or its approximation (``tanh``).
        tensors: ``gate`` and ``up``, each ``(*, ff)``; where they are halves of one tensor, that, ``(*, 2 ff)``.
    """

    activation: str
    tensors: tuple[Tensor, ...]

    def remake(self) -> tuple[Tensor, Tensor]:
        """The tensor, computed as it was, and the activation alone."""
        gate, up = self._parts()
        activated = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate=self.activation)
        return activated * up, activated

    def gradients(self, d_x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``tensors`` from that of the tensor.

        Args:
            d_x: Gradient of the tensor; used up.
            activated: From `remake`.
        """
        gate, up = self._parts()
        made = [torch.empty_like(tensor) for tensor in self.tensors]
        d_gate, d_up = made if len(made) == 2 else made[0].chunk(2, -1)
        torch.mul(d_x, activated, out=d_up)
        torch.mul(d_x, up, out=d_x)
        if self.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_x, gate, grad_input=d_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(d_x, gate, approximate=self.activation, grad_input=d_gate)
        return tuple(made)

    def _parts(self) -> Sequence[Tensor]:
        return self.tensors if len(self.tensors) == 2 else self.tensors[0].chunk(2, -1)


def origin(x: Tensor) -> Origin | None:
    """Where ``x`` comes from, or None: not from a gate, or somebody wants the gradients of what lies between.

    Args:
        x: An input; what is returned stands for it in the graph, so no gradient will reach ``x`` itself.
    """
    node: Any = x.grad_fn
    if node is None:
        return None
    # Hooks on saved tensors belong to checkpointing and offloading, which do better than this.
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    if autograd._top_saved_tensors_default_hooks(True) is not None or not _is_untouched(x):
        return None
    if node.name() != "MulBackward0":
        return None
    # Autograd keeps a factor only for the gradient of the other: both, if both have one.
    factors = node._saved_self, node._saved_other
    if factors[0] is None or factors[1] is None or factors[0].shape != factors[1].shape:
        return None
    for activated, up in (factors, factors[::-1]):
        if (made := _activation(activated)) is not None:
            whole = _whole(made[1], up)
            return Origin(made[0], (made[1], up) if whole is None else (whole,))
    return None


def remade(made: Origin | None, sources: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """The input and, if it has an origin, the activation alone: from what was kept, None if nothing was."""
    if made is None:
        return sources[0], None
    return made._replace(tensors=tuple(sources)).remake()


def source_gradients(
    made: Origin | None, sources: Sequence[Tensor], d_x: Tensor, activated: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the sources from that of the input, which is used up."""
    if made is None or activated is None:
        return (d_x,)
    return made._replace(tensors=tuple(sources)).gradients(d_x, activated)


def _activation(x: Tensor) -> tuple[str, Tensor] | None:
    """Name and input of the activation that made ``x``."""
    node: Any = x.grad_fn
    if node is None or node.name() not in ("SiluBackward0", "GeluBackward0") or not _is_untouched(x):
        return None
    return ("silu" if node.name() == "SiluBackward0" else node._saved_approximate), node._saved_self


def _is_untouched(x: Tensor) -> bool:
    """Whether ``x`` is as its operation made it, and nobody asked for its gradient."""
    return x._version == 0 and not x._backward_hooks and not x.retains_grad


def _whole(gate: Tensor, up: Tensor) -> Tensor | None:
    """The tensor that both are the halves of, along the last axis."""
    whole = gate._base
    if whole is None or whole is not up._base or not whole.is_contiguous() or whole._version:
        return None
    width = gate.shape[-1]
    is_halved = whole.shape == (*gate.shape[:-1], 2 * width) and gate.stride() == up.stride() == whole.stride()
    offsets = gate.storage_offset() - whole.storage_offset(), up.storage_offset() - whole.storage_offset()
    asked_for = gate._backward_hooks or up._backward_hooks or gate.retains_grad or up.retains_grad
    return whole if is_halved and offsets == (0, width) and not asked_for else None
