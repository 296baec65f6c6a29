"""How the input of a layer came about, where it is cheaper to compute again than to keep.

The last layer of a feed-forward network is given an activation, mostly times a second tensor: ``silu(gate) * up``. A
backward pass that keeps it, and what autograd keeps to differentiate it, holds four tensors of that width; two are
enough. What made the tensor is read from autograd's graph, so it works in any model, whatever its code looks like.

Shape legend: ``*`` any leading axes, ``ff`` width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Origin(NamedTuple):
    """A tensor as ``activation(first)``, or ``activation(first) * second``.

    Args:
        activation: ``silu``, ``gelu`` (``none``) or its approximation (``tanh``).
        tensors: ``first``, or both, each ``(*, ff)``; where both are the halves of one tensor only that, ``(*, 2 ff)``.
        gated: Whether there is a second.
    """

    activation: str
    tensors: tuple[Tensor, ...]
    gated: bool

    def remake(self) -> tuple[Tensor, Tensor]:
        """The tensor, computed as it was, and the activation alone."""
        first, second = self._parts()
        activated = F.silu(first) if self.activation == "silu" else F.gelu(first, approximate=self.activation)
        return (activated if second is None else activated * second), activated

    def gradients(self, d_x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``tensors`` from that of the tensor.

        Args:
            d_x: Gradient of the tensor; used up.
            activated: From `remake`; used up.
        """
        first, second = self._parts()
        if second is None:
            return (self._through(d_x, first, out=activated),)
        made = [torch.empty_like(tensor) for tensor in self.tensors]
        d_first, d_second = made if len(made) == 2 else made[0].chunk(2, -1)
        torch.mul(d_x, activated, out=d_second)
        self._through(torch.mul(d_x, second, out=d_x), first, out=d_first)
        return tuple(made)

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        if not self.gated:
            return self.tensors[0], None
        first, second = self.tensors if len(self.tensors) == 2 else self.tensors[0].chunk(2, -1)
        return first, second

    def _through(self, d_activated: Tensor, first: Tensor, out: Tensor) -> Tensor:
        """Gradient of the activation's input."""
        if self.activation == "silu":
            return torch.ops.aten.silu_backward.grad_input(d_activated, first, grad_input=out)
        return torch.ops.aten.gelu_backward.grad_input(d_activated, first, approximate=self.activation, grad_input=out)


def origin(x: Tensor) -> Origin | None:
    """Where ``x`` comes from, or None: no activation, or somebody wants the gradients of what lies between.

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
        made = _activation(x)
        return None if made is None else Origin(made[0], (made[1],), gated=False)
    # Autograd keeps a factor only for the gradient of the other: both, if both have one.
    factors = node._saved_self, node._saved_other
    if factors[0] is None or factors[1] is None or factors[0].shape != factors[1].shape:
        return None
    for activated, second in (factors, factors[::-1]):
        if (made := _activation(activated)) is not None:
            whole = _whole(made[1], second)
            return Origin(made[0], (made[1], second) if whole is None else (whole,), gated=True)
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


def _whole(first: Tensor, second: Tensor) -> Tensor | None:
    """The tensor that both are the halves of, along the last axis."""
    whole = first._base
    if whole is None or whole is not second._base or not whole.is_contiguous() or whole._version:
        return None
    width = first.shape[-1]
    is_halved = whole.shape == (*first.shape[:-1], 2 * width) and first.stride() == second.stride() == whole.stride()
    offsets = first.storage_offset() - whole.storage_offset(), second.storage_offset() - whole.storage_offset()
    asked_for = first._backward_hooks or second._backward_hooks or first.retains_grad or second.retains_grad
    return whole if is_halved and offsets == (0, width) and not asked_for else None
