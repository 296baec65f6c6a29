"""Inputs of gated feed-forward networks, which are cheaper to compute again than to keep.

The last layer of such a network receives ``silu(gate) * up``. A backward pass that keeps this product, and what
autograd keeps to differentiate it, holds four tensors of that width; two are enough. How a tensor was computed is read
from autograd's graph, so this works in any model, however its code is written. An activation without a second factor
is kept: computing it again costs as much time and saves half as much.

Shape legend: ``*`` any leading axes, ``ff`` width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.kernels import chosen
from lightning_lora.lora.functional.torch_internals import saved_tensor_hooks, uninitialised


class GatedInput(NamedTuple):
    """A tensor as ``activation(gate) * up``.

    Args:
        activation: ``"silu"``, or how gelu is approximated: ``"none"`` or ``"tanh"``.
        sources: ``gate`` and ``up``, each ``(*, ff)``; the tensor ``(*, 2 ff)`` alone where they are its halves.
    """

    activation: str
    sources: tuple[Tensor, ...]


def gated_input(x: Tensor) -> GatedInput | None:
    """How ``x`` was computed; None if not by a gate, or if gradients of the tensors in between are asked for.

    Args:
        x: Input of a layer. The result stands for it in the graph, so no gradient will reach ``x`` itself.
    """
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0" or not _is_untouched(x):
        return None
    # Hooks on saved tensors belong to checkpointing and offloading, which save more memory than this.
    if saved_tensor_hooks() is not None:
        return None
    # Autograd keeps a factor only for the gradient of the other one: both factors if both have a gradient.
    left, right = _saved(node, "self"), _saved(node, "other")
    if left is None or right is None or left.shape != right.shape:
        return None
    for activated, up in ((left, right), (right, left)):
        activation, gate = _activation(activated)
        if gate is not None:
            whole = _whole(gate, up)
            return GatedInput(activation, (gate, up) if whole is None else (whole,))
    return None


def recomputed(activation: str | None, sources: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """The input of a layer and the activation alone, from `GatedInput`.

    Args:
        activation: The activation of a `GatedInput`; None if the input was kept itself.
        sources: The sources of a `GatedInput`, or the input alone, which may be None; then there is no activation to
            return, as where a kernel computes the input.
    """
    if activation is None:
        return sources[0], None
    gate, up = _gate_and_up(sources)
    if not torch.is_grad_enabled() and _has_kernel("gate_apart", activation, sources):
        from lightning_lora.lora.functional.kernels.gate import gated_product

        return gated_product(activation, gate, up), None
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=activation)
    return activated * up, activated


def source_gradients(
    activation: str | None, sources: Sequence[Tensor], d_x: Tensor, activated: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of ``sources`` from that of the input.

    Args:
        d_x: Gradient of the input; overwritten.
        activated: The activation alone, from `recomputed`; overwritten.
    """
    if activation is None:
        return (d_x,)
    if activated is None:
        return _by_kernel(activation, sources, d_x, product=False)[0]
    gate, up = _gate_and_up(sources)
    if len(sources) == 2:
        # In place: these are the largest tensors of a backward pass, which holds the most memory here.
        d_gate, d_up = gradients = d_x, activated
    else:
        gradients = (uninitialised(sources[0], sources[0].shape),)
        d_gate, d_up = _gate_and_up(gradients)
    torch.mul(d_x, activated, out=d_up)
    torch.mul(d_x, up, out=d_x)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(d_x, gate, grad_input=d_gate)
    else:
        torch.ops.aten.gelu_backward.grad_input(d_x, gate, approximate=activation, grad_input=d_gate)
    return gradients


def gradients_and_input(activation: str, sources: Sequence[Tensor], d_x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What `source_gradients` and `recomputed` return, without the activation, by a kernel (`is_one_pass`).

    Args:
        d_x: Gradient of the input; overwritten.
    """
    return _by_kernel(activation, sources, d_x, product=True)


def is_one_pass(activation: str, sources: Sequence[Any]) -> bool:
    """Whether a kernel is chosen for `gradients_and_input`."""
    return _has_kernel("gate", activation, sources)


def _has_kernel(name: str, activation: str, sources: Sequence[Any]) -> bool:
    """Whether a kernel is chosen for a gate."""
    gate, _ = _gate_and_up(sources)
    width = gate.shape[-1]
    return chosen(name, gate_shape(activation, len(sources), width), gate.numel() // max(width, 1), *sources)


def gate_shape(activation: str, num_sources: int, width: int) -> str:
    """How the table of kernels calls a gate."""
    return f"{activation}{' halves' if num_sources == 1 else ''} {width}"


def _by_kernel(
    activation: str, sources: Sequence[Tensor], d_x: Tensor, product: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    from lightning_lora.lora.functional.kernels.gate import gated_gradients

    gradients = tuple(uninitialised(source, source.shape) for source in sources)
    gate, up = _gate_and_up(sources)
    x = gated_gradients(activation, gate, up, d_x, _gate_and_up(gradients), product)
    return gradients, x


def _gate_and_up(sources: Sequence[Any]) -> Sequence[Tensor]:
    return sources if len(sources) == 2 else sources[0].chunk(2, -1)


def _activation(x: Tensor) -> tuple[str, Tensor | None]:
    """Name and input of the activation that computed ``x``; the input is None where no known activation did."""
    node: Any = x.grad_fn
    if node is None or node.name() not in ("SiluBackward0", "GeluBackward0") or not _is_untouched(x):
        return "", None
    return ("silu" if node.name() == "SiluBackward0" else node._saved_approximate), _saved(node, "self")


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor that a node of the graph saved; None where hooks packed it, since unpacking may compute it again."""
    raw = getattr(node, f"_raw_saved_{name}")
    return None if raw.unpack_hook is not None else getattr(node, f"_saved_{name}")


def _is_untouched(x: Tensor) -> bool:
    """Whether ``x`` is as its operation left it, and its own gradient was not asked for."""
    return x._version == 0 and not x._backward_hooks and not x.retains_grad


def _whole(gate: Tensor, up: Tensor) -> Tensor | None:
    """The contiguous tensor whose halves along the last axis are ``gate`` and ``up``, or None."""
    whole = gate._base
    if whole is None or whole is not up._base or not whole.is_contiguous():
        return None
    width = gate.shape[-1]
    is_halved = whole.shape == (*gate.shape[:-1], 2 * width) and gate.stride() == up.stride() == whole.stride()
    offsets = gate.storage_offset() - whole.storage_offset(), up.storage_offset() - whole.storage_offset()
    asked_for = gate._backward_hooks or up._backward_hooks or gate.retains_grad or up.retains_grad
    return whole if is_halved and offsets == (0, width) and not asked_for else None
